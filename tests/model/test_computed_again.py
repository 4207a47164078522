"""Results that are made again: the same bits, and neither they nor the graph of their making are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_deepstack.model.layers.computed_again import ComputedAgain, Note, storage_key

ROWS, WIDTH = 12, 8


def parts() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return torch.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, 5)


def run(
    norm: torch.nn.Module, linear: torch.nn.Module, again: ComputedAgain | None, keep: Callable[[Any], None]
) -> list[torch.Tensor]:
    """Output, and gradients of input, norm and linear where they have one; `keep` sees all that autograd keeps."""

    def pack(tensor: torch.Tensor) -> torch.Tensor | Note:
        kept = again.note(tensor) if again is not None else None
        keep(tensor if kept is None else kept)
        return tensor if kept is None else kept

    def unpack(kept: torch.Tensor | Note) -> torch.Tensor:
        return kept.read() if isinstance(kept, Note) else kept

    if again is not None:
        again.wrap(norm)
        again.open = True
    x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
    with saved_tensors_hooks(pack, unpack):
        y = norm(x)
        result = linear(y) + linear(y.view(-1, WIDTH)[:, :]).sin()
    if again is not None:
        again.close()
    result.square().sum().backward()
    return [result, x.grad, *(one.grad for one in (*norm.parameters(), *linear.parameters()) if one.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("frozen", [(), ("norm",), ("linear",)], ids=["all", "frozen-norm", "frozen-linear"])
def test_values_and_gradients_are_the_same_bits(frozen: tuple[str, ...]) -> None:
    found = []
    for again in (None, ComputedAgain()):
        norm, linear = parts()
        for name, part in (("norm", norm), ("linear", linear)):
            part.requires_grad_(name not in frozen)
        found.append(run(norm, linear, again, lambda kept: None))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_the_input_is_kept() -> None:
    kept: list[Any] = []
    norm, linear = parts()
    run(norm, linear, ComputedAgain(), kept.append)
    notes = [one for one in kept if isinstance(one, Note)]
    own = {storage_key(one) for one in (*norm.parameters(), *linear.parameters())}
    tensors = [one for one in kept if isinstance(one, torch.Tensor) and storage_key(one) not in own]
    assert len(notes) == 2, "both linears read the result"
    wide = [one for one in tensors if one.shape[-1] == WIDTH]
    assert len({storage_key(one) for one in wide}) == 1, "the norm's input, and no normalised values"


def test_the_result_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, linear = parts()
    calls, forward = [], norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: calls.append(x.shape) or forward(x))  # type: ignore[func-returns-value]
    run(norm, linear, ComputedAgain(), lambda kept: None)
    assert len(calls) == 2, "once in each pass, though three read it in the backward pass"


def test_outside_of_a_layers_pass_a_module_is_itself() -> None:
    """As within a part that is computed again as a whole, and in inference."""
    norm, _ = parts()
    again = ComputedAgain()
    again.wrap(norm)
    x = torch.ones(2, WIDTH, requires_grad=True)
    assert "Again" not in type(norm(x).grad_fn).__name__
    again.open = True
    with torch.no_grad():
        assert norm(x).grad_fn is None
    assert "Again" in type(norm(x).grad_fn).__name__
