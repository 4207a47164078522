"""Positions on three axes against transformers' own, and in packs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_deepstack.planning.batch.axial_positions import axial_positions
from megatron_deepstack.planning.batch.packing import merge
from megatron_deepstack.planning.batch.sequence import ExpandedSample, expand
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.views import ViewGrid

WIDE, HIGH, SQUARE = ViewGrid(1, 4, 12), ViewGrid(1, 8, 2), ViewGrid(1, 4, 4)


def opened(before: Sequence[int], grids: Sequence[ViewGrid], seq_length: int = 99) -> ExpandedSample:
    """A sample with `before[k]` tokens of text before image k, and the last number after the last image."""
    tokens = [token for number in before for token in [*[5] * number, IMAGE_TOKEN_ID]][:-1]
    lengths = [grid.num_tokens(2) for grid in grids]
    return expand("s", np.array(tokens), np.zeros(len(tokens), int), lengths, seq_length=seq_length, truncate=True)


@pytest.mark.parametrize(
    ("before", "grids"),
    [([4], []), ([2, 3], [WIDE]), ([1, 1, 5], [HIGH, SQUARE]), ([1, 2, 1, 0], [WIDE, HIGH, WIDE])],
    ids=["text", "one", "two", "three"],
)
def test_positions_are_those_of_transformers(before: list[int], grids: list[ViewGrid]) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    sample = opened(before, grids)
    kinds = torch.zeros(1, sample.length, dtype=torch.int64)
    for span in sample.spans:
        kinds[0, span.start : span.start + span.length] = 1
    shapes = torch.tensor([[g.frames, g.height, g.width] for g in grids]).reshape(-1, 3)
    module = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(module)
    module.config = Qwen3VLConfig()
    expected, _ = module.get_rope_index(torch.from_numpy(sample.tokens)[None], kinds, shapes)
    assert axial_positions(sample, grids, 2).tolist() == expected[:, 0].tolist()


def test_positions_of_a_pack_begin_anew_with_each_sample() -> None:
    parts = [opened([2, 3], [WIDE]), opened([4], []), opened([1, 1, 5], [HIGH, SQUARE])]
    grids = [[WIDE], [], [HIGH, SQUARE]]
    packed = merge([PlannedSample(sequence=part, grids=tuple(g)) for part, g in zip(parts, grids, strict=True)])
    together = axial_positions(packed.sequence, packed.grids, 2)
    alone = [axial_positions(part, g, 2) for part, g in zip(parts, grids, strict=True)]
    assert together.tolist() == np.concatenate(alone, axis=1).tolist()


def test_a_truncated_image_keeps_its_first_positions() -> None:
    whole, cut = (axial_positions(opened([2, 1, 4], [WIDE, HIGH], n), [WIDE, HIGH], 2) for n in (99, 17))
    assert cut.shape == (3, 17)
    assert cut.tolist() == whole[:, :17].tolist()
