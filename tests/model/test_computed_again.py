"""Results that are made again: the same bits, and neither they nor the graph of their making are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_deepstack.model.layers.computed_again import ComputedAgain, ResultNote, is_plain, read, storage_key

ROWS, WIDTH = 12, 8


def parts() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return torch.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, 5)


def run(
    norm: torch.nn.Module, linear: torch.nn.Module, again: ComputedAgain | None, keep: Callable[[Any], None]
) -> list[torch.Tensor]:
    """Output, and gradients of input, norm and linear where they have one; `keep` sees all that autograd keeps."""

    def pack(tensor: torch.Tensor) -> Any:
        kept = again.note(tensor) if again is not None else None
        keep(tensor if kept is None else kept)
        return tensor if kept is None else kept

    if again is not None:
        again.wrap(norm)
        again.open(pack)
    x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).requires_grad_()
    with saved_tensors_hooks(pack, read):
        y = norm(x * 1.5)
        result = linear(y) + linear(y.view(-1, WIDTH)[:, :]).sin() + x.sum(dim=1, keepdim=True)
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
    notes = [one for one in kept if isinstance(one, ResultNote)]
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
    again, kept = ComputedAgain(), []
    again.wrap(norm)
    x = torch.ones(2, WIDTH, requires_grad=True)
    assert again.note(norm(x)) is None
    again.open(lambda tensor: kept.append(tensor) or tensor)  # type: ignore[func-returns-value]
    with torch.no_grad():
        assert again.note(norm(x)) is None
    result = norm(x)
    assert again.note(result) is not None
    again.close()
    assert again.note(result) is None
    assert all(storage_key(one) in {storage_key(x), storage_key(norm.weight)} for one in kept)


def test_which_tensors_are_ordinary() -> None:
    assert is_plain(torch.ones(3))
    assert is_plain(torch.nn.Parameter(torch.ones(3)).t())
    assert not is_plain(torch.ones(3, 3).to_sparse())
    assert not is_plain(torch.nn.Buffer(torch.ones(3)).as_subclass(Odd))


class Odd(torch.Tensor):
    """As packages define them for numbers of 8 bits."""
