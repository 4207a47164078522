"""How evenly the tokens of a step are spread over experts: sums that routers keep on the device until the step ends.

Each router adds to its own line of one table while it runs forward for a gradient, which is once for each micro-batch
whatever is recomputed. Nothing is read before the end of the step, where the tables of all ranks are added up.

Legend: L layers with experts of the whole decoder, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.model.layers.experts import BalancedRouter
from megatron_deepstack.platform.compute.device import local_device


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How evenly the tokens of a global batch were spread over experts; the same in every layout, but for rounding."""

    balance_loss: float | None
    """Mean balancing loss per target over the layers with experts, without its weight `model.language.balance_loss`.
    It is `num_active_experts` where all experts are equally likely, and at most `num_experts`. None without targets."""
    busiest_expert: float | None
    """Share of a layer's tokens that chose the layer's busiest expert, in the layer where it is largest. None without
    tokens."""


class ExpertTally:
    """What this rank's routers have counted in a step."""

    def __init__(self, chunks: Sequence[torch.nn.Module], language: LanguageConfig) -> None:
        """Give each router of this rank its line of the table.

        Args:
            chunks: This rank's part of the decoder.
            language: The decoder.
        """
        self.language, layers = language, expert_layers(language)
        self.table_LE1 = torch.zeros(len(layers), language.num_experts + 1, device=local_device())
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, BalancedRouter):
                    module.tally_E1 = self.table_LE1[layers.index(module.layer_number - 1)]

    def clear(self) -> None:
        """Begin a step."""
        self.table_LE1.zero_()

    def load(self, totals: Sequence[float], num_targets: int) -> ExpertLoad:
        """Say how even a step was.

        Args:
            totals: The tables of all ranks added up, line after line.
            num_targets: Targets of the global batch.

        Returns:
            The step's load.
        """
        experts, width = self.language.num_experts, self.language.num_experts + 1
        lines = [totals[first : first + width] for first in range(0, len(totals), width)]
        balance = experts * sum(line[-1] for line in lines) / len(lines)
        # Every token chooses equally many experts, so the choices of a layer say how many tokens there were.
        chosen = [line[:-1] for line in lines]
        shares = [max(line) * self.language.num_active_experts / sum(line) for line in chosen if any(line)]
        return ExpertLoad(
            balance_loss=balance / num_targets if num_targets else None, busiest_expert=max(shares, default=None)
        )


def tally_of(chunks: Sequence[torch.nn.Module], language: LanguageConfig) -> ExpertTally | None:
    """Return what counts a rank's choices of experts.

    Args:
        chunks: This rank's part of the decoder.
        language: The decoder.

    Returns:
        The tally; None for a decoder without experts.
    """
    return ExpertTally(chunks, language) if expert_layers(language) else None
