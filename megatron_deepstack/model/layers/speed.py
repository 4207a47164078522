"""Which fusions and overlaps a run uses, by the recipe's section `speed` and by what a rank can use.

Each decision is pure. `auto` takes what nothing prevents; `always` makes an error of whatever prevents it.
The reasons and sources of the defaults are in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_deepstack.config.choices import GradientDtype, Layers, OptIn, Precision, RecomputeModule, Switch
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ParallelConfig, Recipe, SpeedConfig
from megatron_deepstack.config.sizes import recomputed_modules
from megatron_deepstack.config.speed_rules import FUSIONS, GRAPHS_AND_GATHER, obstacles, switch_of
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.compute.capabilities import Capabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What is done; all False is plain Megatron-Core."""

    activation_fusion: bool = False
    rope_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    cross_entropy_fusion: bool = False
    optimizer_fusion: bool = False
    vision_engine: bool = False
    """Whether the tower's layers are Transformer Engine's."""
    overlap_p2p: bool = False
    overlap_param_gather: bool = False
    synchronize_p2p: bool = False
    gradient_dtype: torch.dtype = torch.float32
    cuda_graphs: bool = False
    tp_overlap: bool = False


PLAIN = Speed()


def decide_speed(
    wanted: SpeedConfig,
    machine: Capabilities,
    *,
    language: LanguageConfig,
    parallel: ParallelConfig,
    precision: Precision,
    layers: Layers,
    lora: LoraConfig,
) -> Speed:
    """Decide on all fusions and overlaps.

    Args:
        wanted: The recipe's section.
        machine: What this rank can use.
        language: The decoder.
        parallel: The layout.
        precision: Dtype of parameters and activations.
        layers: The decoder's layers, as the recipe names them.
        lora: Adapters of the decoder.

    Returns:
        What is done.

    Raises:
        ConfigError: Something that the recipe demands is impossible; all such settings are named with their reasons.
    """
    engine = engine_obstacles(layers, machine)
    vision = engine_obstacles(layers if wanted.vision_layers is Layers.AUTO else wanted.vision_layers, machine)
    decisions = _Decisions(wanted, machine)
    by_recipe = {name: reason for name, (_, reason) in obstacles(language, parallel, precision, lora).items()}
    if wanted.cuda_graphs is OptIn.ALWAYS:
        by_recipe.setdefault("overlap_param_gather", GRAPHS_AND_GATHER)
    by_machine = _lacking(machine, parallel, engine)
    done = {
        name: decisions.decide(name, [*by_machine.get(name, []), *([by_recipe[name]] if name in by_recipe else [])])
        for name in (*FUSIONS, *_OVERLAPS)
    }
    if wanted.vision_layers is Layers.TRANSFORMER_ENGINE:
        decisions.demand("vision_layers", "transformer_engine", vision)
    for name in _ENGINE_ALONE:
        if getattr(wanted, name) is OptIn.ALWAYS:
            decisions.demand(name, "always", engine, instead="never")
    if decisions.problems:
        raise ConfigError(decisions.problems)
    return Speed(
        **done,
        vision_engine=not vision,
        synchronize_p2p=wanted.synchronize_p2p,
        gradient_dtype=torch.bfloat16 if wanted.gradient_dtype is GradientDtype.BF16 else torch.float32,
        **{name: getattr(wanted, name) is OptIn.ALWAYS for name in _ENGINE_ALONE},
    )


def _lacking(machine: Capabilities, parallel: ParallelConfig, engine: list[str]) -> dict[str, list[str]]:
    """What stands against fusions on this machine, where the layers are not the engine's for these reasons."""
    compiler = [machine.compiler_problem] if machine.compiler_problem else []
    kernel = [] if not engine or machine.apex_gradients else [*engine, "Apex's kernel is not installed"]
    if engine and (parallel.offload_layers or RecomputeModule.LAYER_NORM in recomputed_modules(parallel)):
        hidden = "parallel.offload_layers and norms in parallel.recompute_modules hide from them"
        kernel = [*engine, f"Megatron's own linears mark their matrices, which {hidden}"]
    return {
        "activation_fusion": compiler,
        "rope_fusion": engine,
        "gradient_accumulation_fusion": kernel,
        "cross_entropy_fusion": compiler,
    }


def speed_of(recipe: Recipe, machine: Capabilities) -> Speed:
    """Decide on all fusions and overlaps of a recipe, as `decide_speed` does.

    Args:
        recipe: The recipe.
        machine: What this rank can use.

    Returns:
        What is done.

    Raises:
        ConfigError: Something that the recipe demands is impossible.
    """
    return decide_speed(
        recipe.speed,
        machine,
        language=recipe.model.language,
        parallel=recipe.parallel,
        precision=recipe.train.precision,
        layers=recipe.model.layers,
        lora=recipe.lora,
    )


def engine_obstacles(layers: Layers, machine: Capabilities) -> list[str]:
    """Return what keeps layers from being Transformer Engine's.

    Args:
        layers: As the recipe names them.
        machine: What this rank can use.

    Returns:
        Clauses for a message; empty if the layers are Transformer Engine's.
    """
    if layers is Layers.LOCAL:
        return ["the layers are Megatron's local ones"]
    if not machine.gpu:
        return ["this process sees no GPU"]
    return [machine.engine_problem] if machine.engine_problem else []


_OVERLAPS = ("overlap_p2p", "overlap_param_gather")
_ENGINE_ALONE = ("cuda_graphs", "tp_overlap")
"""Done only on demand, and by Transformer Engine."""
_GPU_ONLY = ("activation_fusion", "cross_entropy_fusion", *_OVERLAPS)
"""Not taken on a CPU unless demanded: compiling takes longer than a small model trains, and overlaps need streams."""


class _Decisions:
    """Makes the decisions one by one, and collects what was demanded and is impossible."""

    def __init__(self, wanted: SpeedConfig, machine: Capabilities) -> None:
        self._wanted, self._machine = wanted, machine
        self.problems: list[str] = []

    def decide(self, name: str, obstacles: list[str]) -> bool:
        switch = switch_of(self._wanted, name)
        if switch is Switch.ALWAYS:
            self.demand(name, "always", obstacles)
            return True
        return switch is Switch.AUTO and not obstacles and (self._machine.gpu or name not in _GPU_ONLY)

    def demand(self, name: str, value: str, obstacles: list[str], instead: str = "auto") -> None:
        if obstacles:
            self.problems.append(f"speed.{name}: {value} is impossible here: {'; '.join(obstacles)}; use {instead}")
