"""How far two sets of tensors are apart: whatever is not the same set is infinitely far."""

from __future__ import annotations

import pytest
import torch

from megatron_deepstack.testing.compare import relative_error, worst

ONES = torch.ones(2, 3)


def test_the_worst_name_is_told() -> None:
    error, name = worst({"a": ONES, "b": ONES + 0.5}, {"a": ONES, "b": ONES})
    assert (error, name) == (0.5, "b")


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        ({"a": ONES}, {"a": ONES, "b": ONES}, "b, which is missing"),
        ({"a": ONES, "b": ONES}, {"a": ONES}, "b, which is not expected"),
        ({}, {"a": ONES}, "a, which is missing"),
        ({"a": ONES[:, :1]}, {"a": ONES}, "a"),
        ({"a": ONES * torch.nan}, {"a": ONES}, "a"),
    ],
    ids=["missing", "not expected", "nothing", "another shape", "nan"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], words: str
) -> None:
    assert worst(actual, expected) == (float("inf"), words)


def test_nothing_is_expected() -> None:
    with pytest.raises(AssertionError, match="nothing is expected, so nothing would be compared with 1 tensors"):
        worst({"a": ONES}, {})


def test_rounding_noise_is_measured_against_the_floor() -> None:
    noise = torch.full((2,), 1e-9)
    assert relative_error(noise, -noise) == pytest.approx(2.0)
    assert relative_error(noise, -noise, floor=1.0) == pytest.approx(2e-9)
    assert worst({"a": ONES, "b": noise}, {"a": ONES, "b": -noise})[0] == pytest.approx(2e-7)
