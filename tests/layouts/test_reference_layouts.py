"""Published numbers under every layout that fits four ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.config.choices import EncoderPlacement, Recompute, RecomputeMethod
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.testing.published.reference import check_case
from megatron_deepstack.testing.published.reference_case import load_case
from megatron_deepstack.testing.ranks import RankPool

CASES = ("l_square", "l_start0_interval2", "l_mixed_grids", "l_text_only_sample", "v_layer2", "hd_anyres")
INLINE = EncoderPlacement.INLINE
FULL = Recompute.FULL

# id, ranks, micro-batch size, layout. Measured worst of all 6 cases and layouts: logits 6.8e-6, gradients 1.1e-5.
LAYOUTS = [
    ("one", 1, 1, ParallelConfig()),
    ("one-batch2", 1, 2, ParallelConfig()),
    ("one-inline", 1, 1, ParallelConfig(encoder_placement=INLINE)),
    ("one-rerun", 1, 1, ParallelConfig(encoder_chunk_views=3)),
    ("tp2", 2, 1, ParallelConfig(tensor=2)),
    ("tp2-inline", 2, 1, ParallelConfig(tensor=2, encoder_placement=INLINE)),
    ("tp2-sp", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("pp2", 2, 1, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("pp2-empty-first", 2, 1, ParallelConfig(pipeline=2, layers_per_stage=(0, 8))),
    ("pp2-recompute", 2, 1, ParallelConfig(pipeline=2, recompute=FULL, recompute_num_layers=2)),
    (
        "pp2-recompute-block",
        2,
        1,
        ParallelConfig(pipeline=2, recompute=FULL, recompute_method=RecomputeMethod.BLOCK, recompute_num_layers=3),
    ),
    ("pp2-selective", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.SELECTIVE)),
    ("cp2", 2, 1, ParallelConfig(context=2)),
    ("dp2", 2, 1, ParallelConfig()),
    ("tp2-pp2", 4, 1, ParallelConfig(tensor=2, pipeline=2)),
]


def _cells() -> list[Any]:
    """Every case under every layout; `make test` runs each layout with one case and each case under two or three."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(*layout[1:], case, id=f"{layout[0]}-{case}", marks=slow * (row % len(CASES) != column))
        for row, layout in enumerate(LAYOUTS)
        for column, case in enumerate(CASES)
    ]


@pytest.mark.parametrize(("num_ranks", "batch", "parallel", "case"), _cells())
def test_case_under_layout(
    ranks: Callable[[int], RankPool],
    reference: Path,
    num_ranks: int,
    batch: int,
    parallel: ParallelConfig,
    case: str,
) -> None:
    """Logits, loss and every gradient."""
    result = check_case(ranks(num_ranks), load_case(reference / "deepstack" / case), parallel, batch)
    assert result.passed, str(result)
