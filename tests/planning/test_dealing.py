"""Units dealt to ranks: by cost, and what the plan says of it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.cost import unit_flops
from megatron_deepstack.planning.exchange.dealing import deal_by_cost, deal_in_order, imbalance
from megatron_deepstack.planning.exchange.routes import PlannedSample, plan_routes
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.tiny import tiny_qwen3_vl


def loads(costs: list[float], num_ranks: int) -> list[float]:
    """What each rank has to encode."""
    dealt = deal_by_cost(costs, [1] * len(costs), num_ranks)
    by_number = np.array(costs)[np.argsort(dealt.first_unit)]
    return [float(part.sum()) for part in np.split(by_number, dealt.bounds[1:-1])]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1, 1, 1, 9], [9, 3]),
        ([5, 4, 3, 3, 3], [8, 10]),
        ([2, 2], [2, 2]),
        ([7], [7, 0]),
        ([], [0, 0]),
    ],
    ids=["one huge", "several", "equal", "one", "none"],
)
def test_the_most_costly_first_to_the_rank_with_least_to_do(costs: list[float], expected: list[float]) -> None:
    assert loads(costs, 2) == expected


def test_one_huge_image_costs_its_rank_no_more_than_itself() -> None:
    assert max(loads([100.0, *[1.0] * 30], 4)) == 100.0


def test_units_of_equal_cost_stay_in_order() -> None:
    dealt = deal_in_order([2, 1, 3], [4, 4, 4], 3)
    assert dealt.first_unit.tolist() == [0, 2, 3]
    assert dealt.bounds.tolist() == [0, 2, 4, 6]
    assert dealt.first_row.tolist() == [0, 4, 8, 12, 16, 20, 24]


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    bounds = np.array([0, 1, 3])
    assert imbalance([3.0, 1.0], [range(1), range(1, 3)], bounds) == pytest.approx(3 / 2.5)
    assert imbalance([], [], np.array([0, 0, 0])) == 1.0


def test_a_plan_says_how_uneven_its_encoding_is() -> None:
    """A view of eight times the patches and three small ones on two ranks."""
    model = tiny_qwen3_vl()
    grids = (ViewGrid(1, 16, 8), *[ViewGrid(1, 4, 4)] * 3)
    lengths = [context_length(model, grid) for grid in grids]
    tokens = np.array([IMAGE_TOKEN_ID] * 4 + [5])
    sequence = expand("s", tokens, np.array([0, 0, 0, 0, 1]), lengths, seq_length=99, truncate=False)
    batches = [[PlannedSample(sequence=sequence, grids=grids)]]
    routes = [plan_routes(model, ParallelConfig(pipeline=2), batches, (sequence.length,), rank) for rank in range(2)]
    big, small = (unit_flops(model, grid) for grid in grids[:2])
    assert [len(one.units) for one in routes] == [1, 3]
    assert routes[0].imbalance == routes[1].imbalance == pytest.approx(2 * big / (big + 3 * small))
    assert routes[0].grids == grids
