"""Experts of a layer in one tensor, as transformers stores them, and one by one, as the published names have them.

transformers has two tensors in each layer with experts, of which the first index is the expert:

    mlp.experts.gate_up_proj   (E, 2F, H) in its modules and in what it saves, (E, H, 2F) in the folders of Qwen3-VL-MoE
    mlp.experts.down_proj      (E, H, F), and (E, F, H) there

It turns the second form into the first where the shape shows it, and so does this module. Our names are those of a
decoder whose experts have tensors of their own, `mlp.experts.3.gate_proj.weight`, so that a rank reads the experts that
it holds and no others; folders that have these names are read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch

from megatron_deepstack.convert.tensor_files import LazyTensor, lazy_tensor, read_part
from megatron_deepstack.errors import CheckpointError

_PARTS: Final[Mapping[str, tuple[str, ...]]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What is stacked in each tensor, one after another along the outputs."""
_STACK: Final = re.compile(r"(?P<layer>.*mlp\.experts\.)(?P<kind>gate_up_proj|down_proj)")
_ONE: Final = re.compile(r"(?P<layer>.*mlp\.experts\.)(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")


class _Place(NamedTuple):
    """Where a tensor of an expert lies in a stack."""

    stack: str
    expert: int
    part: int
    """Its number among the tensors that are stacked along the outputs."""
    num_parts: int


def _place(published: str) -> _Place | None:
    found = _ONE.fullmatch(published)
    if found is None:
        return None
    kind, parts = next((kind, parts) for kind, parts in _PARTS.items() if found["part"] in parts)
    return _Place(f"{found['layer']}{kind}", int(found["expert"]), parts.index(found["part"]), len(parts))


def is_stack(name: str) -> bool:
    """Whether a tensor of this name, in a folder or published, holds all experts of a layer."""
    return _STACK.fullmatch(name) is not None


def is_of_expert(published: str) -> bool:
    """Whether a tensor of this published name belongs to one expert."""
    return _ONE.fullmatch(published) is not None


def names_in_stack(stack: str, num_experts: int) -> tuple[str, ...]:
    """Return the published names of all that a stack holds.

    Args:
        stack: The published name of the stack, such as `model.layers.0.mlp.experts.down_proj`.
        num_experts: Its experts.

    Returns:
        The names, expert by expert; the stack's own name if it is none.
    """
    found = _STACK.fullmatch(stack)
    if found is None:
        return (stack,)
    layer, parts = found["layer"], _PARTS[found["kind"]]
    return tuple(f"{layer}{expert}.{part}.weight" for expert in range(num_experts) for part in parts)


def read_expert(file: Path, own: str, published: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read one tensor of one expert from a stack; of the file nothing else is read.

    Args:
        file: The file that holds the stack.
        own: The stack's name in the file.
        published: The published name of the expert's tensor.
        shape: Its shape, (outputs, inputs).

    Returns:
        The tensor, in the dtype of the file.

    Raises:
        CheckpointError: The stack has another shape, or fewer experts.
    """
    place = _place(published)
    assert place is not None, f"{published} is no tensor of an expert"
    outputs, inputs = shape
    whole, found = place.num_parts * outputs, lazy_tensor(file, own).shape
    rows = slice(place.part * outputs, (place.part + 1) * outputs)
    if len(found) == 3 and found[0] > place.expert and found[1:] == (whole, inputs):
        return read_part(file, own, (place.expert, rows))
    if len(found) == 3 and found[0] > place.expert and found[1:] == (inputs, whole):
        return read_part(file, own, (place.expert, slice(None), rows)).t().contiguous()
    raise CheckpointError(
        f"{file}: {own} has shape {tuple(found)}, the recipe's experts need ({place.expert + 1} or more, {whole}, "
        f"{inputs}), or the last two the other way round; choose the model the checkpoint was made with"
    )


def taken_apart(stack: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Take a stack apart, in the form that transformers' modules have.

    Args:
        stack: The published name of the stack, or of another tensor.
        tensor: (E, outputs, inputs); or the other tensor.

    Yields:
        Published names and tensors of the experts; another tensor as it is.
    """
    found = _STACK.fullmatch(stack)
    if found is None:
        yield stack, tensor
        return
    num_parts = len(_PARTS[found["kind"]])
    pieces = (piece for expert in tensor for piece in expert.chunk(num_parts))
    yield from zip(names_in_stack(stack, len(tensor)), pieces, strict=True)


def stacked_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Put the tensors of experts together as transformers has them. Nothing is read before a stack is.

    Args:
        tensors: All tensors of a model by their published names.

    Returns:
        The same in the same order, where each stack stands in the place of its first tensor.
    """
    members: dict[str, dict[_Place, LazyTensor]] = {}
    for name, tensor in tensors.items():
        place = _place(name)
        if place is not None:
            members.setdefault(place.stack, {})[place] = tensor
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        place = _place(name)
        if place is None:
            found[name] = tensor
        elif place.stack not in found:
            found[place.stack] = _stacked(members[place.stack])
    return found


def _stacked(members: Mapping[_Place, LazyTensor]) -> LazyTensor:
    by_number = {(place.expert, place.part): tensor for place, tensor in members.items()}
    num_experts, num_parts = max(number for number, _ in by_number) + 1, next(iter(members)).num_parts
    assert len(by_number) == num_experts * num_parts, "an expert of a layer is missing"
    one = next(iter(members.values()))
    outputs, inputs = one.shape

    def read() -> torch.Tensor:
        rows = (torch.cat([by_number[e, part].read() for part in range(num_parts)]) for e in range(num_experts))
        return torch.stack(list(rows))

    return LazyTensor((num_experts, num_parts * outputs, inputs), one.dtype, read)
