"""The bytes that a run needs at least, counted from the recipe: a checkpoint, and what a rank keeps between steps.

A weight takes 2 bytes in bf16 and 4 in float32. A weight that learns also has a gradient (`speed.gradient_dtype`),
Adam's two moments (`optimizer.moment_dtype`), and in bf16 a float32 copy. Activations are not counted here (`memory`
adds them), so a rank needs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepstack.config.choices import GradientDtype, MomentDtype, Precision
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.budget.parameters import (
    Held,
    adapter_parameters,
    encoder_parameters,
    learned_parameters,
    model_parameters,
    parameters_of_stages,
)

GRADIENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Lasting:
    """Bytes that a rank keeps from step to step."""

    weights: int
    gradients: int
    optimizer: int
    """Its states, and in bf16 the float32 copy of weights that learn."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def element_bytes(precision: Precision) -> int:
    """Return the bytes of a weight, and of an entry of an activation."""
    return 4 if precision is Precision.FP32 else 2


def gradient_bytes(recipe: Recipe) -> int:
    """Return the bytes of an entry of a gradient buffer."""
    return 2 if recipe.speed.gradient_dtype is GradientDtype.BF16 else GRADIENT_BYTES


def lasting_bytes(recipe: Recipe, num_ranks: int) -> tuple[Lasting, ...]:
    """Return what the ranks of each pipeline stage keep from step to step.

    Args:
        recipe: The recipe, whose layout has been checked.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.

    Returns:
        Bytes of one rank, without activations, stage by stage.
    """
    return lasting_bytes_of(recipe, num_ranks, parameters_of_stages(recipe))


def lasting_bytes_of(recipe: Recipe, num_ranks: int, stages: Sequence[Held]) -> tuple[Lasting, ...]:
    """Return what `lasting_bytes` does, for a caller that has counted the parameters of each stage already.

    Args:
        recipe: The recipe, whose layout has been checked.
        num_ranks: Number of ranks of the run.
        stages: The parameters of each stage, as `parameters_of_stages` counts them.

    Returns:
        Bytes of one rank, without activations, stage by stage.
    """
    parallel, element = recipe.parallel, element_bytes(recipe.train.precision)
    shares = num_ranks // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
    expert_shares = num_ranks // (parallel.expert * parallel.pipeline) if parallel.distributed_optimizer else 1
    everyone = num_ranks if parallel.distributed_optimizer else 1
    encoder, state = encoder_parameters(recipe), _state_bytes(recipe)
    return tuple(
        Lasting(
            weights=(decoder.total + encoder.total) * element,
            gradients=(decoder.learned + encoder.learned) * gradient_bytes(recipe),
            optimizer=(decoder.learned - decoder.experts_learned) * state // shares
            + decoder.experts_learned * state // expert_shares
            + encoder.learned * state // everyone,
        )
        for decoder in stages
    )


def rank_bytes(recipe: Recipe, num_ranks: int) -> int:
    """Return the memory of weights, gradients and optimizer states on the rank that needs most.

    Args:
        recipe: The recipe.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.

    Returns:
        Bytes, without activations.
    """
    return max(one.total for one in lasting_bytes(recipe, num_ranks))


def weight_bytes(recipe: Recipe) -> int:
    """Return the bytes of the model's weights in the run's precision."""
    return sum(model_parameters(recipe.model).values()) * element_bytes(recipe.train.precision)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the bytes of one checkpoint: all weights, and the optimizer's states of those that learn."""
    weights = sum(model_parameters(recipe.model).values()) + adapter_parameters(recipe)
    return weights * element_bytes(recipe.train.precision) + learned_parameters(recipe) * _state_bytes(recipe)


def checkpoints_at_once(recipe: Recipe) -> int:
    """Return how many checkpoints are in the run folder at the same time, with the one that is being written.

    Args:
        recipe: The run's recipe.

    Returns:
        At least 1. If all checkpoints are kept, only the first three count, and those that `keep_every` keeps do not
        count, since users are expected to move such checkpoints elsewhere.
    """
    every, steps = recipe.checkpoint.interval, recipe.train.steps
    saves = -(-steps // every) if every else 1
    return max(1, min(saves, (recipe.checkpoint.keep or 2) + 1))


def _state_bytes(recipe: Recipe) -> int:
    """Return the optimizer's bytes of a parameter that learns."""
    main = 0 if recipe.train.precision is Precision.FP32 else 4
    return main + (4 if recipe.optimizer.moment_dtype is MomentDtype.BF16 else 8)
