"""Choosing the next token: the most likely one, or one drawn by temperature and top-p.

A draw is a function of (seed, number of the question, number of the token) alone, so that an answer depends neither on
the layout nor on the questions beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from megatron_deepstack.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divides the logits before tokens are drawn; 0 takes the most likely token instead."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are drawn (Holtzman et al., 2020)."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"--temperature: found {self.temperature}, expected 0 (most likely token) or more")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"--top-p: found {self.top_p}, expected a number above 0 up to 1")
        if self.seed < 0:
            problems.append(f"--seed: found {self.seed}, expected 0 or more")
        if problems:
            raise ConfigError(problems)

    def choose(self, logits_BV: torch.Tensor, questions: np.ndarray, token: int) -> torch.Tensor:
        """Choose a token for each sequence.

        Args:
            logits_BV: Logits over the whole vocabulary.
            questions: Integers (B,): number of each sequence's question.
            token: Number of the token in the answer.

        Returns:
            int64 (B,) on the device of the logits.
        """
        if self.temperature == 0.0:
            return logits_BV.float().argmax(dim=-1)
        probabilities_BV = torch.softmax(logits_BV.double().cpu() / self.temperature, dim=-1).numpy()
        draws = [np.random.default_rng((self.seed, int(number), token)).random() for number in questions]
        drawn = [_draw(row, self.top_p, draw) for row, draw in zip(probabilities_BV, draws, strict=True)]
        return torch.tensor(drawn, dtype=torch.int64, device=logits_BV.device)


def _draw(probabilities_V: np.ndarray, top_p: float, draw: float) -> int:
    """The token at the share `draw`, 0 to below 1, of the tokens that are kept, the most likely first."""
    order = np.argsort(-probabilities_V, kind="stable")
    summed = np.cumsum(probabilities_V[order])
    kept = int(np.searchsorted(summed, min(top_p, summed[-1]))) + 1
    return int(order[np.searchsorted(summed[:kept], draw * summed[kept - 1], side="right")])


GREEDY: Final = Sampling()
