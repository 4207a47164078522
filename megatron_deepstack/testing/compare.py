"""Published tensors gathered from all ranks, and how far two sets of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megatron_deepstack.model.build import RankModel
from megatron_deepstack.parallel.groups import Groups

Pick = Callable[[torch.nn.Parameter], torch.Tensor | None]


def gather_published(model: RankModel, groups: Groups, pick: Pick) -> dict[str, torch.Tensor]:
    """A tensor of every parameter, under published names, on every rank.

    Made for tests: everything meets on every rank. Collective over all ranks.

    Args:
        model: This rank's model.
        groups: The process groups of the layout.
        pick: From a parameter to the tensor that is wanted, such as its gradient; None leaves the parameter out.

    Returns:
        Published name to the whole tensor, float32 on the CPU.
    """
    mine: dict[str, torch.Tensor] = {}
    modules = [(model.encoder, model.encoder_rules, groups.encoder.tp)]
    modules += [(chunk, rules, groups.decoder.tp) for chunk, rules in zip(model.chunks, model.chunk_rules, strict=True)]
    for module, rules, tp_group in modules:
        for name, parameter in module.named_parameters():
            tensor = pick(parameter)
            if tensor is None:
                continue
            whole = tensor.detach().float().contiguous()
            shards = [whole] if rules[name].is_expert else gather_shards(whole, tp_group)
            for published, value in zip(rules[name].names, rules[name].published(shards), strict=True):
                mine.setdefault(published, value.cpu())
    stages = groups.decoder.pp if groups.decoder.ep.size() == 1 else groups.decoder.tp_ep_pp
    everything: list[dict[str, torch.Tensor] | None] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(everything, mine, group=stages)
    return {name: value for part in everything if part for name, value in part.items()}


def gather_shards(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensor of every rank of a group, in rank order. Collective over the group.

    Args:
        tensor: Of the same shape and dtype on every rank, contiguous.
        group: The ranks that take part.
    """
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, tensor, group=group)
    return shards


def main_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """A parameter's final gradient in Megatron's buffer; None while it is frozen."""
    return getattr(parameter, "main_grad", None) if parameter.requires_grad else None


NOISE_FLOOR = 1e-2
"""Share of the largest entry of all gradients below which a tensor's own largest entry is no scale.

A ViT's key biases have no gradient in exact arithmetic (softmax ignores a shift), so both sides hold rounding noise: at
most 2.5e-8 in the published numbers, where every other tensor's largest entry exceeds 0.009 of a model's 0.4 to 0.7.
"""


def relative_error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest entry of `expected`, or `floor`; infinite where NaN appears.

    Args:
        actual: any shape, float.
        expected: of the same shape. Another shape is infinitely wrong, and is not broadcast.
        floor: the smallest scale, for tensors that hold rounding noise only.
    """
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual - expected).abs().max()
    scale = max(float(expected.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float("inf") if torch.isnan(difference) else float(difference) / scale


def worst(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest `relative_error` over all names of two sets of tensors.

    Args:
        actual: tensors by name.
        expected: tensors by the same names, at least one.

    Returns:
        The error and the name that it belongs to. A name that stands on one side only is infinitely wrong: the result
        names it, and says which side has it.

    Raises:
        AssertionError: nothing is expected, so that the comparison could not fail.
    """
    assert expected, f"nothing is expected, so nothing would be compared with {len(actual)} tensors"
    one_sided = [f"{name}, which is missing" for name in expected if name not in actual]
    one_sided += [f"{name}, which is not expected" for name in actual if name not in expected]
    if one_sided:
        return float("inf"), "; ".join(one_sided[:8])
    floor = NOISE_FLOOR * max(float(value.abs().max()) for value in expected.values())
    return max((relative_error(actual[name], value, floor), name) for name, value in expected.items())
