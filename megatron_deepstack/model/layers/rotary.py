"""The decoder's positions: what each layer rotates queries and keys by.

One place builds it, so that a family with other positions (of several axes, on part of a head) is added in one place.
Positions that are scaled to long sequences differ in their frequencies alone, so whatever cuts, restarts or looks up
angles does not know of them; the factor that YaRN gives attention scores is in `config.rope_scaling`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig
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
        return AxialRotary(inverse_frequencies(language), language.mrope_section)
    rotary = RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_base=language.rope_theta,
        cp_group=groups.cp,
    )
    rotary.inv_freq = inverse_frequencies(language)  # before the first table is made of them
    return rotary


def inverse_frequencies(language: LanguageConfig) -> torch.Tensor:
    """Angles by which each pair of channels of a head turns from one position to the next.

    They are computed in float32 in the order of transformers' operations, so that they are equal bit for bit.

    Args:
        language: The decoder.

    Returns:
        float32 (D / 2,), in descending order.
    """
    width, scaling = head_width(language), language.rope_scaling
    numbers = torch.arange(0, width, 2, dtype=torch.float32, device=local_device())
    plain = 1.0 / (language.rope_theta ** (numbers / width))
    factor = scaling.factor or 1.0
    if scaling.rope_type is RopeType.LINEAR:
        return plain / factor
    if scaling.rope_type is RopeType.LLAMA3:
        return _llama3_frequencies(plain, scaling)
    if scaling.rope_type is RopeType.YARN:
        slow = 1.0 / (factor * language.rope_theta ** (numbers / width))
        kept = _kept_share(width, language.rope_theta, scaling).to(plain.device)
        return slow * (1 - kept) + plain * kept
    return plain


def _llama3_frequencies(plain: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Divide slow frequencies by the factor, and those between the two bounds in part."""
    assert scaling.factor is not None
    assert scaling.original_max_position_embeddings is not None
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    kept = (length / wavelengths - low) / (high - low)
    between = (1 - kept) * plain / scaling.factor + kept * plain
    scaled = torch.where(wavelengths > length / low, plain / scaling.factor, between)
    return torch.where(wavelengths < length / high, plain, scaled)


def _kept_share(width: int, theta: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """YaRN's share of each frequency that stays as it is: float32 (D / 2,), from 1 for fast ones to 0 for slow ones."""
    assert scaling.original_max_position_embeddings is not None
    length = scaling.original_max_position_embeddings
    first, last = (
        width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first or 0.001
    return 1 - ((torch.arange(width // 2, dtype=torch.float32) - first) / span).clamp(0, 1)


class AxialRotary(torch.nn.Module):
    """Angles of positions on three axes, whose frequencies are interleaved within a head (Qwen3-VL's M-RoPE).

    Of the frequencies f = 0, 1, 2, ..., those with f = 1 (mod 3) turn by line as long as f < 3 x the second section,
    those with f = 2 (mod 3) by column as long as f < 3 x the third section, and all others by time.
    """

    def __init__(self, inv_freq: torch.Tensor, section: tuple[int, int, int]) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        self.axis = axis_of_frequency(len(inv_freq), section).to(inv_freq.device)

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
