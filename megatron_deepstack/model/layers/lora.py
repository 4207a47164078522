"""LoRA: low-rank adapters beside linears (Hu et al., arXiv 2106.09685): y = W x + alpha / rank * B A x.

An adapted linear is a subclass of Megatron's own (local or Transformer Engine's) with two more matrices, so layers,
schedules, recomputation and checkpoints see a linear. Megatron fuses query, key and value, and gate and up, and so one
A serves each fused group. A starts uniform, B zero, and the base weight W is frozen.

Tensor parallelism splits B of a column-parallel linear like its outputs, and A of a row-parallel one like its inputs.
The other matrix is whole on every tp rank, and what crosses ranks is the narrow A x:

    column, no sequence parallelism   x whole        A x whole, its gradient summed over tp
    column, sequence parallelism      x a shard      A x gathered, its gradient reduce-scattered; A's summed at the end
    row, no sequence parallelism      x a slice      A x summed over tp
    row, sequence parallelism         x a slice      A x reduce-scattered, B sees a shard; B's summed at the end

"At the end" is Megatron's `finalize_model_grads`, which sums the gradients of parameters marked `sequence_parallel`.

Legend: S sequence, B micro-batch, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_deepstack.config.choices import LoraTarget
from megatron_deepstack.config.schema import LoraConfig
from megatron_deepstack.platform.compute.device import local_device

NO_ADAPTERS = LoraConfig()
GATE_AND_UP = ("lora_b_gate", "lora_b_up")
"""B of the MLP's input, whose two outputs are each split over tp by itself."""
ROW_TARGETS = (LoraTarget.ATTENTION_OUTPUT, LoraTarget.MLP_OUT)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name, ours or published, belongs to an adapter."""
    return "lora_" in name


class WithAdapter(torch.nn.Module):
    """A linear with an adapter beside it."""

    weight: torch.Tensor
    lora: LoraConfig
    lora_a: torch.nn.Parameter
    b_names: tuple[str, ...]
    """Names of the matrices that are B one below another."""

    def _b(self) -> torch.Tensor:
        """(outputs of this rank, R)."""
        return torch.cat([self.get_parameter(name) for name in self.b_names])

    def merge(self) -> None:
        """Add the adapter to the base weight, in float32, and drop it. Each tp rank merges its shard by itself."""
        with torch.no_grad():
            change = self.lora.alpha / self.lora.rank * (self._b().float() @ self.lora_a.float())
            self.weight.copy_(self.weight.float() + change)
        self.drop()

    def drop(self) -> None:
        """Remove the adapter; the base weight stays as it is. The linear cannot run after this."""
        for name in ("lora_a", *self.b_names):
            del self._parameters[name]


class AdaptedLinear(WithAdapter):
    """What an adapted linear adds to a column- or row-parallel one; comes before it among the bases."""

    config: Any
    target: LoraTarget

    def __init__(self, input_size: int, output_size: int, *, tp_group: torch.distributed.ProcessGroup, **rest: Any):
        super().__init__(input_size, output_size, tp_group=tp_group, **rest)  # type: ignore[call-arg]
        self.adapter_group = tp_group
        self.splits_sequence = bool(self.config.sequence_parallel) and tp_group.size() > 1
        self.is_row = self.target in ROW_TARGETS
        gated = self.target is LoraTarget.MLP_IN and self.config.gated_linear_unit
        self.b_names = GATE_AND_UP if gated else ("lora_b",)
        inputs, outputs = input_size, output_size // len(self.b_names)
        if self.is_row:
            inputs //= tp_group.size()
        else:
            outputs //= tp_group.size()
        self.lora_a = self._matrix(self.lora.rank, inputs, partial=self.splits_sequence and not self.is_row)
        for name in self.b_names:
            self.register_parameter(
                name, self._matrix(outputs, self.lora.rank, partial=self.splits_sequence and self.is_row)
            )

    def _matrix(self, rows: int, columns: int, *, partial: bool) -> torch.nn.Parameter:
        """An adapter's matrix; `partial` says that its gradient must be summed over tp."""
        matrix = torch.nn.Parameter(torch.empty(rows, columns, dtype=self.config.params_dtype, device=local_device()))
        matrix.sequence_parallel = partial  # type: ignore[attr-defined]
        return matrix

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the linear's, plus alpha / R * B A x. Collective over tp; gradients flow to x, A and B.

        Args:
            x: (S, B, inputs of this rank); S is this rank's part if a column-parallel linear splits the sequence.
            *args: The linear's.
            **kwargs: The linear's.

        Returns:
            (S, B, outputs of this rank), and the bias that the linear leaves to the caller, if any.
        """
        output, bias = super().forward(x, *args, **kwargs)
        narrow = self._exchange(torch.nn.functional.linear(x, self.lora_a))
        scale = self.lora.alpha / self.lora.rank
        return output + scale * torch.nn.functional.linear(narrow, self._b()), bias

    def _exchange(self, narrow_SBR: torch.Tensor) -> torch.Tensor:
        """A x as B of this rank wants it."""
        if self.is_row:
            if self.splits_sequence:
                return reduce_scatter_to_sequence_parallel_region(narrow_SBR, group=self.adapter_group)
            return reduce_from_tensor_model_parallel_region(narrow_SBR, group=self.adapter_group)
        if self.splits_sequence:
            return gather_from_sequence_parallel_region(narrow_SBR, group=self.adapter_group)
        return copy_to_tensor_model_parallel_region(narrow_SBR, group=self.adapter_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As the linear's, with the adapter's matrices split as they are. Not collective.

        Args:
            prefix: What keys begin with.
            sharded_offsets: Where this layer lies in tensors of all layers, as Megatron describes it.
            metadata: Megatron's; gives the data-parallel group.

        Returns:
            Sharded tensors by key.
        """
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        matrices = {name: self.get_parameter(name) for name in ("lora_a", *self.b_names)}
        split = {"lora_a": 1} if self.is_row else dict.fromkeys(self.b_names, 0)
        groups = {"tp_group": self.adapter_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        state.update(make_sharded_tensors_for_checkpoint(matrices, prefix, split, sharded_offsets, **groups))
        return state


class AdaptedPlain(WithAdapter, torch.nn.Linear):
    """A linear of torch with an adapter, as in projectors; every rank holds all of it."""

    def __init__(self, linear: torch.nn.Linear, lora: LoraConfig) -> None:
        """It takes the place of `linear`, whose parameters become its own."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora, self.b_names = lora, ("lora_b",)
        self.lora_a = torch.nn.Parameter(self.weight.new_empty(lora.rank, self.in_features))
        self.lora_b = torch.nn.Parameter(self.weight.new_empty(self.out_features, lora.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs); gradients flow to x, A and B."""
        narrow = torch.nn.functional.linear(x, self.lora_a)
        change = torch.nn.functional.linear(narrow, self.lora_b)
        return torch.nn.functional.linear(x, self.weight, self.bias) + self.lora.alpha / self.lora.rank * change


def adapt_linears(module: torch.nn.Module, lora: LoraConfig) -> None:
    """Give every linear of torch below a module an adapter.

    Args:
        module: Changed in place.
        lora: The recipe's section; gives rank and alpha.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, AdaptedPlain(child, lora))


@cache
def adapted(linear: type, target: LoraTarget, lora: LoraConfig) -> type:
    """A linear of a layer with an adapter beside it.

    Args:
        linear: The class of a column- or row-parallel linear.
        target: What the linear is in its layer.
        lora: The recipe's section; gives rank, alpha and targets.

    Returns:
        A subclass, the same one for the same arguments; the class itself if the recipe wants no adapter there.
    """
    if not lora.rank or target not in lora.targets:
        return linear
    return type(f"Lora{linear.__name__}", (AdaptedLinear, linear), {"target": target, "lora": lora})
