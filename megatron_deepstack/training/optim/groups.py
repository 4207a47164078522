"""Groups of parameters with the same rates: a part of the model, and whether it decays.

Together they cover each trainable parameter exactly once; `check_cover` compares what Megatron's optimizers hold with
what the model holds, `group_table` shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import OptimizerConfig
from megatron_deepstack.parallel.reduce import sum_over_model
from megatron_deepstack.step.engine import Engine


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rate and weight decay by part."""

    config: OptimizerConfig

    def peak_lr(self, part: Part) -> float:
        """The part's own where the recipe names one, else that of all."""
        special = {Part.VISION: self.config.vision_lr, Part.PROJECTOR: self.config.projector_lr}.get(part)
        return self.config.lr if special is None else special

    def weight_decay(self, part: Part) -> float:
        """The weight decay of the part's matrices, by the same rule."""
        config = self.config
        special = {Part.VISION: config.vision_weight_decay, Part.PROJECTOR: config.projector_weight_decay}.get(part)
        return config.weight_decay if special is None else special


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with the same rates."""

    part: Part
    shape: str
    """`matrices`, which decay, or `vectors`, which do not."""
    num_parameters: int
    """Of the whole model, each counted once; the vocabulary's padding included."""
    peak_lr: float
    weight_decay: float


def part_of(name: str) -> Part:
    """Part that a parameter belongs to, by its name in the wrapped module."""
    bare = name.removeprefix("module.")
    if bare.startswith("vit."):
        return Part.VISION
    return Part.PROJECTOR if bare.startswith("projector.") or bare == "newline" else Part.LANGUAGE


def parameter_groups(engine: Engine, rates: Rates) -> tuple[ParameterGroup, ...]:
    """The groups of the whole model that are not empty. Collective over tp and pp.

    Args:
        engine: This rank's part of the model.
        rates: Peak rates and weight decay of the parts.

    Returns:
        The groups, in the order of the parts, the same on every rank.
    """
    kinds = [(part, shape) for part in Part for shape in ("matrices", "vectors")]
    counts: Counter[tuple[Part, str]] = Counter()
    for ddp in engine.decoder_ddp:
        counts.update(dict(_once(ddp, engine.groups.place.tp, engine.groups.decoder.ep.size())))
    totals = Counter(dict(zip(kinds, sum_over_model([counts[kind] for kind in kinds], engine.groups), strict=True)))
    if engine.encoder_ddp is not None:
        totals.update(_tally(_trainable(engine.encoder_ddp)))
    return tuple(
        ParameterGroup(
            part=part,
            shape=shape,
            num_parameters=totals[part, shape],
            peak_lr=rates.peak_lr(part),
            weight_decay=rates.weight_decay(part) if shape == "matrices" else 0.0,
        )
        for part, shape in kinds
        if totals[part, shape]
    )


Named = Iterator[tuple[str, torch.nn.Parameter]]


def _trainable(module: torch.nn.Module) -> Named:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _tally(parameters: Named) -> Counter[tuple[Part, str]]:
    counts: Counter[tuple[Part, str]] = Counter()
    for name, parameter in parameters:
        counts[part_of(name), "vectors" if parameter.dim() == 1 else "matrices"] += parameter.numel()
    return counts


def _once(module: torch.nn.Module, tp_rank: int, expert_ranks: int) -> Counter[tuple[Part, str]]:
    """What this rank counts: its shards; what all tp ranks hold, only on the first of them; a tied embedding once.

    Of experts the first tp rank counts its own for all ranks that share the layer's: they have equally many.
    """
    own = [(name, one) for name, one in _trainable(module) if not getattr(one, "shared", False)]
    experts = [(name, one) for name, one in own if not getattr(one, "allreduce", True)]
    others = [(name, one) for name, one in own if getattr(one, "allreduce", True)]
    counts = _tally((name, one) for name, one in others if tp_rank == 0 or getattr(one, "tensor_model_parallel", False))
    if tp_rank == 0:
        counts.update({kind: number * expert_ranks for kind, number in _tally(iter(experts)).items()})
    return counts


def check_cover(engine: Engine, chained: ChainedOptimizer) -> None:
    """Assert that this rank's groups hold its trainable parameters, each once and in the group of its part and shape.

    Under the distributed optimizer a rank's groups hold shards, and Megatron's own map says which parameters these
    come from. A parameter without a shard on this rank is not in the map.

    Args:
        engine: This rank's part of the model.
        chained: Its optimizers.

    Raises:
        AssertionError: A parameter is missing, in two groups, or in a group although it is not trained.
    """
    trained = sum((_tally(_trainable(ddp)) for ddp in engine.wrapped), Counter())
    if not engine.parallel.distributed_optimizer:
        grouped = sum(p.numel() for group in chained.param_groups for p in group["params"])
        assert grouped == trained.total(), f"{trained.total()} trainable parameters, {grouped} in optimizer groups"
        return
    known = {id(parameter) for ddp in engine.wrapped for _, parameter in _trainable(ddp)}
    mapped = [
        id(parameter)
        for single in chained.chained_optimizers
        if isinstance(single, DistributedOptimizer)
        for parameter in single.model_param_group_index_map
    ]
    assert len(mapped) == len(set(mapped)), "a parameter is in two optimizer groups"
    assert set(mapped) <= known, "an optimizer group holds a parameter that is not trained"


def group_table(groups: Sequence[ParameterGroup]) -> list[str]:
    """The groups as lines of text, and their sum."""
    rows = [("part", "", "parameters", "peak lr", "weight decay")]
    rows += [
        (str(group.part), group.shape, f"{group.num_parameters:,}", f"{group.peak_lr:g}", f"{group.weight_decay:g}")
        for group in groups
    ]
    rows.append(("all that learns", "", f"{sum(group.num_parameters for group in groups):,}", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
