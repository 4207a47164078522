"""The decoder's positions: what each layer rotates queries and keys by.

One place builds it, so that a family with other positions (scaled, of several axes, on part of a head) has one seam.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.parallel.context import own_part


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


def restarted(angles: torch.Tensor, ends: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """Angles of a packed row, whose positions begin at 0 with each sample.

    Args:
        angles: (S, 1, 1, D) of positions 0 to S - 1 of the whole row.
        ends: Where the samples end in the row; the last end is S.
        group: The context-parallel group, whose ranks share each sample.

    Returns:
        (S of this cp rank, 1, 1, D), made without asking the device for anything.
    """
    row = torch.cat([angles[: end - begin] for begin, end in pairwise((0, *ends))])
    return own_part(row, ends, group) if group.size() > 1 else row
