"""All layouts of a recipe on a number of GPUs: those that fit in order of predicted time, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import Recompute
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.errors import ConfigError, LayoutError
from megatron_deepstack.planning.budget.hardware import Machine
from megatron_deepstack.planning.budget.load import Shapes
from megatron_deepstack.planning.budget.run_plan import RunPlan, plan_run
from megatron_deepstack.planning.check import check_world, find_plan_problems, model_ranks

_MOST_STAGES = 32
_LONG_SEQUENCE = 8192
"""Sequences from this length on are tried with context parallelism."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout that cannot run."""

    parallel: ParallelConfig
    reason: str


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of a recipe on a number of GPUs."""

    fitting: tuple[RunPlan, ...]
    """Those that fit, the fastest first."""
    too_large: tuple[RunPlan, ...]
    """Those that need too much memory, the smallest first."""
    refused: tuple[Refused, ...]
    """Those that the model or the batch does not allow."""


def all_layouts(recipe: Recipe, shapes: Shapes, machine: Machine, num_ranks: int) -> Layouts:
    """Plan a run under every layout.

    Args:
        recipe: The recipe; of its layout only the encoder's placement and recomputation's method are kept.
        shapes: Sizes of the samples of one step.
        machine: The kind of device.
        num_ranks: Number of GPUs.

    Returns:
        The layouts.
    """
    plans, refused = [], []
    for parallel in _candidates(recipe, machine, num_ranks):
        other = replace(recipe, parallel=parallel)
        problems = find_problems(other) or find_plan_problems(other)
        if problems:
            refused.append(Refused(parallel, problems[0].text))
            continue
        try:
            check_world(other, num_ranks)
        except (LayoutError, ConfigError) as error:
            refused.append(Refused(parallel, error.problems[0]))
            continue
        plans.append(plan_run(other, shapes, machine, num_ranks))
    fitting = sorted((one for one in plans if one.fits), key=lambda one: one.seconds.total)
    too_large = sorted((one for one in plans if not one.fits), key=lambda one: one.fullest.memory.total)
    return Layouts(tuple(fitting), tuple(too_large), tuple(refused))


def _candidates(recipe: Recipe, machine: Machine, num_ranks: int) -> Iterator[ParallelConfig]:
    layers = recipe.model.language.num_layers
    most_context = 8 if recipe.train.seq_length >= _LONG_SEQUENCE else 1
    recomputes = (Recompute.NONE, Recompute.FULL)
    for tensor in _divisors(num_ranks, machine.gpus_per_node):
        for pipeline in _divisors(num_ranks // tensor, min(layers, _MOST_STAGES)):
            for context in _divisors(num_ranks // tensor // pipeline, most_context):
                replicas = num_ranks // (tensor * pipeline * context)
                for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                    if virtual > 1 and layers % (pipeline * virtual):
                        continue
                    shared = _shared_experts(recipe.model.language, machine, num_ranks // pipeline)
                    for recompute, expert in product(recomputes, shared):
                        yield replace(
                            recipe.parallel,
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            virtual_pipeline=virtual,
                            expert=expert,
                            sequence_parallel=tensor > 1,
                            layers_per_stage=None,
                            distributed_optimizer=replicas * context > 1,
                            recompute=recompute,
                            recompute_num_layers=1,
                        )


def _shared_experts(language: LanguageConfig, machine: Machine, stage_ranks: int) -> list[int]:
    """Numbers of ranks that may share experts: one, as many as a node has, and as many as possible."""
    if not expert_layers(language):
        return [1]
    most = gcd(language.num_experts, stage_ranks)
    return sorted({1, gcd(most, machine.gpus_per_node), most})


def _divisors(number: int, most: int) -> list[int]:
    return [one for one in range(1, min(number, most) + 1) if number % one == 0]


def describe(parallel: ParallelConfig, num_ranks: int) -> str:
    """Write a layout in words, such as `TP 2 SP x PP 4 VPP 2 x DP 8 ZeRO-1, recompute full`.

    Args:
        parallel: The layout.
        num_ranks: Number of all ranks.

    Returns:
        The words.
    """
    replicas = num_ranks // model_ranks(parallel)
    parts = []
    if parallel.tensor > 1:
        parts.append(f"TP {parallel.tensor}" + (" SP" if parallel.sequence_parallel else ""))
    if parallel.pipeline > 1:
        parts.append(
            f"PP {parallel.pipeline}" + (f" VPP {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else "")
        )
    if parallel.context > 1:
        parts.append(f"CP {parallel.context}")
    if parallel.expert > 1:
        parts.append(f"EP {parallel.expert}")
    if replicas > 1:
        parts.append(f"DP {replicas}" + (" ZeRO-1" if parallel.distributed_optimizer else ""))
    text = " x ".join(parts) or "one rank"
    return text + (f", recompute {parallel.recompute}" if parallel.recompute is not Recompute.NONE else "")


def overrides(parallel: ParallelConfig) -> str:
    """Write a layout as overrides of the command line."""
    values = {
        "tensor": parallel.tensor,
        "sequence_parallel": str(parallel.sequence_parallel).lower(),
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "distributed_optimizer": str(parallel.distributed_optimizer).lower(),
        "recompute": parallel.recompute,
    }
    if parallel.expert > 1:
        values["expert"] = parallel.expert
    return " ".join(f"parallel.{name}={value}" for name, value in values.items())
