"""The decoder's positions: what each layer rotates queries and keys by.

One place builds it, so that a family with other positions (scaled, of several axes, on part of a head) has one seam.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import LanguageConfig


def build_rotary(
    language: LanguageConfig, config: TransformerConfig, groups: ProcessGroupCollection
) -> RotaryEmbedding:
    """The rotary embedding of the recipe's decoder.

    Args:
        language: The decoder.
        config: Its Megatron config, which says the width of a head.
        groups: The decoder's groups; sequences are split over `cp`.

    Returns:
        A module that maps a sequence length (and whether samples are packed) to angles (S of this cp rank, 1, 1, D).
    """
    return RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_base=language.rope_theta,
        cp_group=groups.cp,
    )


def restarted(angles: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Angles of a packed row, whose positions begin at 0 with each sample.

    Args:
        angles: (S, 1, 1, D) of positions 0 to S - 1.
        ends: Where the samples end in the row; the last end is S.

    Returns:
        (S, 1, 1, D), made without asking the device for anything.
    """
    return torch.cat([angles[: end - begin] for begin, end in pairwise((0, *ends))])


def angles_at(rotary: RotaryEmbedding, positions: torch.Tensor, capacity: int) -> torch.Tensor:
    """Angles of any positions, for steps with a key/value cache.

    Args:
        rotary: As `build_rotary` returns it.
        positions: int64 (S, B), or (S, 1) for a batch in step, all below `capacity`.
        capacity: Number of positions for which a table is made; the same number again takes the same table.

    Returns:
        (S, B or 1, 1, D).
    """
    table = rotary(capacity, packed_seq=True)  # of the whole sequence: a packed row is not cut over cp
    return table[:, 0][positions]
