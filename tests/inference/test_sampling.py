"""The next token: the most likely, or drawn as temperature and top-p say, the same whatever stands beside it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_deepstack.errors import ConfigError
from megatron_deepstack.inference.sampling import GREEDY, Sampling

LOGITS = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]))


def drawn(sampling: Sampling, row: int, number: int = 4000) -> dict[int, float]:
    """Share of each token among many draws."""
    counted = Counter(int(sampling.choose(LOGITS[row : row + 1], np.array([n]), 0)[0]) for n in range(number))
    return {token: count / number for token, count in counted.items()}


def test_greedy_takes_the_most_likely() -> None:
    assert GREEDY.choose(LOGITS, np.array([0, 1]), 0).tolist() == [1, 0]


def test_tokens_are_drawn_by_their_probability() -> None:
    """4000 draws: a share's standard deviation is at most 0.008."""
    shares = drawn(Sampling(temperature=1.0), 0)
    assert shares == {token: pytest.approx(share, abs=0.04) for token, share in ((0, 0.1), (1, 0.6), (2, 0.3))}


def test_temperature_sharpens() -> None:
    """At 1/2 probabilities are squared: 0.01, 0.36, 0.09 of 0.46."""
    assert drawn(Sampling(temperature=0.5), 0)[1] == pytest.approx(0.36 / 0.46, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.6, {1}), (0.61, {1, 2}), (0.9, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2}), (1e-9, {1})]
)
def test_only_the_most_likely_that_reach_top_p_are_drawn(top_p: float, kept: set[int]) -> None:
    shares = drawn(Sampling(temperature=1.0, top_p=top_p), 0, 300)
    assert set(shares) == kept


def test_a_draw_depends_on_seed_question_and_token_alone() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    together = sampling.choose(LOGITS, np.array([7, 8]), 3)
    alone = [sampling.choose(LOGITS[n : n + 1], np.array([7 + n]), 3) for n in range(2)]
    assert together.tolist() == [int(token[0]) for token in alone]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "--temperature: found -1.0, expected 0"),
        ({"temperature": float("nan")}, "--temperature: found nan"),
        ({"top_p": 0.0}, "--top-p: found 0.0, expected a number above 0 up to 1"),
        ({"top_p": 1.5}, "--top-p: found 1.5"),
        ({"seed": -1}, "--seed: found -1, expected 0 or more"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**changes)  # type: ignore[arg-type]
