"""Units dealt to ranks: by cost, and what the plan says of it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import ParallelConfig, TrainConfig
from megatron_deepstack.planning.batch.dealing import Dealing, deal, encoder_costs_of
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


def test_replicas_are_dealt_views_by_what_they_cost() -> None:
    """One large view costs more than four of a quarter of it, and its replica gets less of the others."""
    model = tiny_qwen3_vl()
    views = np.array([[0, 1, 32, 32], *([one, 1, 16, 16] for one in (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3))])
    units = np.array([256] * 4)
    costs = encoder_costs_of(model, units, views)
    assert costs[0] > 1.2 * costs[1] == 1.2 * costs[2]
    assert costs[0] == unit_flops(model, ViewGrid(1, 32, 32))
    assert encoder_costs_of(model, units, None).tolist() == [256.0] * 4
    lengths = np.array([300] * 8)
    costs = np.array([4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    train = TrainConfig(global_batch_size=8, micro_batch_size=1, seq_length=512)
    dealt = deal(lengths, costs, model.language, ParallelConfig(), train, 2)
    shares = [sum(costs[one] for batch in mine for row in batch for one in row) for mine in dealt.replicas]
    assert sorted(shares) == [5.0, 7.0], "equally many samples, and the huge one beside the smallest"


def test_a_huge_view_holds_its_rank_back_by_its_own_cost() -> None:
    sizes = [(64, 64), *[(8, 8)] * 30]
    costs = [unit_flops(tiny_qwen3_vl(), ViewGrid(1, *size)) for size in sizes]
    dealt = deal_by_cost(costs, [1] * len(costs), 4)
    owner = np.searchsorted(dealt.bounds, dealt.first_unit, side="right") - 1
    assert np.bincount(owner, costs, 4).max() == costs[0]


@pytest.mark.parametrize("batching", list(Batching))
def test_a_dealing_gives_every_layout_what_it_gives_one_alone(batching: Batching) -> None:
    random = np.random.default_rng(3)
    lengths, costs = random.integers(20, 500, 96), random.random(96)
    language = tiny_qwen3_vl().language
    train = TrainConfig(
        global_batch_size=96, micro_batch_size=2 - (batching is Batching.PACKED), seq_length=512, batching=batching
    )
    shared = Dealing(lengths, costs, language, train)
    layouts = [ParallelConfig(), ParallelConfig(context=2), ParallelConfig(pipeline=2, virtual_pipeline=2)]
    for parallel in (*layouts, *layouts):
        for replicas in (1, 4):
            alone, found = deal(lengths, costs, language, parallel, train, replicas), shared.deal(parallel, replicas)
            assert found.replicas == alone.replicas
            assert found.balance == alone.balance
            assert np.array_equal(found.lengths, alone.lengths)
            samples, places = found.members(replicas - 1)
            last = found.replica(replicas - 1)
            assert samples.tolist() == [one for batch in last for row in batch for one in row]
            assert np.bincount(places, minlength=len(last)).tolist() == [sum(map(len, batch)) for batch in last]
            assert sorted(found.samples.tolist()) == list(range(96))
            assert sorted(found.table.ravel().tolist()) == list(range(found.table.size))
