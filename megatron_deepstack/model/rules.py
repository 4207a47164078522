"""Rules: how one of our parameters is made of published tensors, and how that is done and undone.

Megatron fuses query, key and value, and gate and up projections, pads the vocabulary and splits over tp. A rule names
the published tensors with their shapes, and says how they are fused and split. The rules themselves are in `weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
Source = Callable[[str, Shape], torch.Tensor]
"""Published name and shape to the full tensor."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range along one dimension of a published tensor."""

    dim: int
    start: int
    stop: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of the whole tensor, without a copy."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


class PartialSource(ABC):
    """A Source that can also make a part of a tensor, without the rest of it."""

    @abstractmethod
    def __call__(self, name: str, shape: Shape) -> torch.Tensor:
        """Make a tensor.

        Args:
            name: Its published name.
            shape: Its shape.

        Returns:
            All of it.
        """

    @abstractmethod
    def part(self, name: str, shape: Shape, span: Span) -> torch.Tensor:
        """Make a part of a tensor.

        Args:
            name: Its published name.
            shape: The shape of all of it.
            span: Which part.

        Returns:
            The same numbers as in this part of the whole tensor.
        """


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our parameters in terms of published tensors."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    groups: int = 1
    """The published tensors are interleaved in this many groups along dim 0: group 0 of each, group 1 of each, ..."""
    tp_dim: int | None = None
    """Dimension of the fused tensor that is split over tp."""
    concatenated: bool = False
    """Each published tensor is split over tp by itself and the parts are concatenated (gate and up)."""
    is_expert: bool = False
    """It belongs to one expert, which is whole on the ranks that hold it; other ranks hold others."""
    padded_rows: int | None = None
    """Rows after padding with zeros (vocabulary)."""
    stacked: int = 1
    """The one published tensor consists of this many tensors of the same shape, one after another along dim 0, which
    are interleaved here as if they were several."""

    def shard(self, source: Source, rank: int, num_ranks: int) -> torch.Tensor:
        """Make our parameter from published tensors. Not collective.

        Args:
            source: Published name and shape to the full tensor; of a `PartialSource` only the rank's part is asked.
            rank: The tensor-parallel rank whose shard is wanted.
            num_ranks: Ranks that share the parameter.

        Returns:
            The shard.
        """
        num_ranks = 1 if self.tp_dim is None else num_ranks
        return self._join([self._part(source, k, rank, num_ranks) for k in range(len(self.names))], num_ranks)

    def _part(self, source: Source, k: int, rank: int, num_ranks: int) -> torch.Tensor:
        """What a rank needs of the published tensor of number k: whole groups of rows, or some columns."""
        name, shape = self.names[k], self.shapes[k]
        if num_ranks == 1:
            return source(name, shape)
        assert self.stacked == 1, f"{name}: interleaved tensors are not split over tp"
        whole_groups = self.concatenated or len(self.names) == 1 or self.groups % num_ranks == 0
        assert whole_groups, f"{name}: {num_ranks} ranks cannot share {self.groups} groups"
        dim = self.tp_dim or 0
        size = shape[dim] if self.padded_rows is None else self.padded_rows
        assert size % num_ranks == 0, f"{name}: {size} is no multiple of the {num_ranks} ranks that share it"
        own = size // num_ranks
        span = Span(dim, min(rank * own, shape[dim]), min((rank + 1) * own, shape[dim]))
        if isinstance(source, PartialSource):
            return source.part(name, shape, span)
        return span.of(source(name, shape))

    def published(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The published tensors, in the order of `names`, from our parameter on every tp rank."""
        if self.concatenated:
            parts = [shard.chunk(len(self.names), dim=0) for shard in shards]
            return [torch.cat([part[k] for part in parts]) for k in range(len(self.names))]
        full = shards[0] if self.tp_dim is None else torch.cat(list(shards), dim=self.tp_dim)
        return self._take_apart(full)

    def _join(self, tensors: Sequence[torch.Tensor], num_ranks: int) -> torch.Tensor:
        """A shard from a rank's parts of the published tensors."""
        if self.concatenated:
            return torch.cat(list(tensors))
        if self.padded_rows is not None:
            (only,) = tensors
            padding = only.new_zeros(self.padded_rows // num_ranks - len(only), *only.shape[1:])
            return torch.cat([only, padding])
        if self.stacked > 1:
            (only,) = tensors
            tensors = only.chunk(self.stacked)
        if len(tensors) == 1:
            return tensors[0]
        groups = self.groups // num_ranks
        grouped = torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1)
        return grouped.flatten(0, 1)

    def _take_apart(self, full: torch.Tensor) -> list[torch.Tensor]:
        if self.stacked > 1:
            parts = full.unflatten(0, (self.groups, self.stacked, -1))
            return [parts.transpose(0, 1).flatten(0, 2)]
        if len(self.names) == 1:
            return [full[: self.shapes[0][0]]]
        sizes = [shape[0] // self.groups for shape in self.shapes]
        parts = full.unflatten(0, (self.groups, -1)).split(sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]


Rules = dict[str, Rule]


def fill(
    module: torch.nn.Module,
    rules: Rules,
    source: Source,
    rank: int,
    num_ranks: int,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Set the parameters of a module from full published tensors. Not collective.

    Args:
        module: Changed in place.
        rules: Rules of all its parameters.
        source: Published name and shape to the full tensor, of any float dtype; of a `PartialSource` the rank's part
            alone is asked.
        rank: The tp rank whose shard is taken.
        num_ranks: Ranks that share a tensor.
        wanted: Whether a parameter of that name is set; every one by default.
    """
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        shard = rules[name].shard(source, rank, num_ranks)
        assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} for {tuple(parameter.shape)}"
        with torch.no_grad():
            parameter.copy_(shard)


def mark_split(module: torch.nn.Module, rules: Rules) -> None:
    """Tell Megatron which parameters are split over tp: the others count once in a gradient norm. Not collective.

    Its layers do so themselves only while they initialise, which ours do not. Parameters of experts are reduced over
    the ranks that hold the same experts, and count on each rank of another expert, as if they were split.

    Args:
        module: Its parameters are marked.
        rules: Rules of all its parameters.
    """
    for name, parameter in module.named_parameters():
        rule = rules[name]
        parameter.tensor_model_parallel = rule.tp_dim is not None or rule.is_expert  # type: ignore[attr-defined]
        if rule.is_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]  # Megatron's word for "with other experts' ranks"
