"""The decoder's positions: what each layer rotates queries and keys by.

One place builds it, so that a family with other positions (scaled, of several axes, on part of a head) is added in one
place.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.sizes import head_width
from megatron_deepstack.parallel.context import own_part
from megatron_deepstack.platform.compute.device import local_device


def build_rotary(
    language: LanguageConfig, config: TransformerConfig, groups: ProcessGroupCollection
) -> RotaryEmbedding | AxialRotary:
    """The rotary embedding of the recipe's decoder.

    Args:
        language: The decoder.
        config: Its Megatron config, which says the width of a head.
        groups: The decoder's groups; sequences are split over `cp`.

    Returns:
        A module that maps a sequence length (and whether samples are packed) to angles (S of this cp rank, 1, 1, D), or
        an `AxialRotary`, which maps positions to angles.
    """
    if language.mrope_section is not None:
        return AxialRotary(head_width(language), language.rope_theta, language.mrope_section)
    return RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_base=language.rope_theta,
        cp_group=groups.cp,
    )


class AxialRotary(torch.nn.Module):
    """Angles of positions on three axes, whose frequencies are interleaved within a head (Qwen3-VL's M-RoPE).

    Of the frequencies f = 0, 1, 2, ..., those with f = 1 (mod 3) turn by line as long as f < 3 x the second section,
    those with f = 2 (mod 3) by column as long as f < 3 x the third section, and all others by time.
    """

    def __init__(self, head_width: int, theta: float, section: tuple[int, int, int]) -> None:
        super().__init__()
        numbers = torch.arange(0, head_width, 2, dtype=torch.float32, device=local_device())
        self.inv_freq = 1.0 / (theta ** (numbers / head_width))
        self.axis = axis_of_frequency(head_width // 2, section).to(local_device())

    def forward(self, positions_3BS: torch.Tensor) -> torch.Tensor:
        """Angles of this rank's positions.

        Args:
            positions_3BS: int64 positions in time, line and column.

        Returns:
            (S, B, 1, D), float32.
        """
        chosen_BSF = positions_3BS.permute(1, 2, 0).float()[..., self.axis] * self.inv_freq
        return torch.cat([chosen_BSF, chosen_BSF], dim=-1).transpose(0, 1)[:, :, None]


def axis_of_frequency(num_frequencies: int, section: tuple[int, int, int]) -> torch.Tensor:
    """Return the axis by which each frequency of a head turns: 0 time, 1 line, 2 column.

    Args:
        num_frequencies: Half of the width of a head.
        section: Number of frequencies of each axis; that of time follows from the others.

    Returns:
        int64 (num_frequencies,).
    """
    numbers = torch.arange(num_frequencies)
    axis = numbers % 3
    limits = torch.tensor([0, *(3 * size for size in section[1:])])
    return torch.where(numbers < limits[axis], axis, 0)


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
