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
from megatron_deepstack.planning.budget.load import Shapes, StepLoads
from megatron_deepstack.planning.budget.run_plan import MemoryPlan, RunPlan, plan_memory, plan_time
from megatron_deepstack.planning.check import find_plan_problems, model_ranks

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
    too_large: tuple[MemoryPlan, ...]
    """Those that need too much memory, the smallest first; what time they would take is not estimated."""
    refused: tuple[Refused, ...]
    """Those that the model or the batch does not allow."""


def all_layouts(recipe: Recipe, shapes: Shapes, machine: Machine, num_ranks: int) -> Layouts:
    """Plan a run under every layout.

    Args:
        recipe: The recipe, which has been checked; of its layout only the encoder's placement and recomputation's
            method are kept.
        shapes: Sizes of the samples of one step.
        machine: The kind of device.
        num_ranks: Number of GPUs.

    Returns:
        The layouts.
    """
    loads, plans, refused = StepLoads(recipe.model, recipe.train, shapes), [], []
    for parallel in _candidates(recipe, machine, num_ranks):
        found = _memory_of(replace(recipe, parallel=parallel), loads, machine, num_ranks)
        if isinstance(found, Refused):
            refused.append(found)
        else:
            plans.append(found)
    fitting = sorted((plan_time(one) for one in plans if one.fits), key=lambda one: one.seconds.total)
    too_large = sorted((one for one in plans if not one.fits), key=lambda one: one.fullest.memory.total)
    return Layouts(tuple(fitting), tuple(too_large), tuple(refused))


def any_layout_fits(recipe: Recipe, loads: StepLoads, machine: Machine, num_ranks: int) -> bool:
    """Whether there is a layout that fits.

    Args:
        recipe: The recipe, of whose layout as much is kept as by `all_layouts`.
        loads: Loads of the samples of one step, made for the recipe.
        machine: The kind of device.
        num_ranks: Number of GPUs.

    Returns:
        True at the first layout that fits.
    """
    for parallel in _candidates(recipe, machine, num_ranks):
        found = _memory_of(replace(recipe, parallel=parallel), loads, machine, num_ranks)
        if isinstance(found, MemoryPlan) and found.fits:
            return True
    return False


def _memory_of(recipe: Recipe, loads: StepLoads, machine: Machine, num_ranks: int) -> MemoryPlan | Refused:
    problems = find_problems(recipe, ("parallel.",)) or find_plan_problems(recipe)
    if problems:
        return Refused(recipe.parallel, problems[0].text)
    try:
        return plan_memory(recipe, loads, machine, num_ranks)
    except (LayoutError, ConfigError) as error:
        return Refused(recipe.parallel, error.problems[0])


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
