"""Tiny models and samples for tests, which train in a second on four CPU ranks.

Their sizes are uneven, so that a mistake shows. Samples have no image, one, or several, anywhere in the text, on
different grids. Everything is drawn from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.planning.batch.dealing import deal
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import Grid, context_length
from megatron_deepstack.planning.views import num_views

GRIDS: tuple[Grid, ...] = ((2, 2), (1, 2), (3, 1), (2, 1), (4, 1), (1, 1))


@dataclass(frozen=True, slots=True)
class TinySample:
    """A sample that carries its own pixels instead of lying in a store."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    grids: tuple[Grid, ...]
    pixels: tuple[np.ndarray, ...]
    """Per image uint8 (views, S, S, 3)."""

    def planned(self, model: ModelConfig, seq_length: int, truncate: bool = False) -> PlannedSample:
        """The sample as the planner takes it.

        Args:
            model: The recipe's model.
            seq_length: The most tokens after placeholders are expanded.
            truncate: Cut a longer sample instead of refusing it.

        Raises:
            DataError: The sample is longer, and may not be cut.
        """
        sequence = expand(
            "tiny",
            self.tokens,
            self.loss_mask,
            [context_length(model, grid) for grid in self.grids],
            seq_length=seq_length,
            truncate=truncate,
        )
        return PlannedSample(sequence=sequence, grids=self.grids)


def tiny_model(**changes: object) -> ModelConfig:
    """Eight decoder layers of width 32, a ViT of three, four stacks before layers 0, 3, 5 and 7.

    Args:
        **changes: Fields of `ModelConfig` that are to be otherwise.
    """
    settings: dict[str, object] = {
        "vision": VisionConfig(
            image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2
        ),
        "language": LanguageConfig(
            vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4, norm_epsilon=1e-5
        ),
        "stacks": StackConfig(slots=(0, 3, 5, 7)),
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_recipe(
    model: ModelConfig | None = None,
    parallel: ParallelConfig | None = None,
    *,
    trainable: tuple[Part, ...] = tuple(Part),
    precision: Precision = Precision.FP32,
    global_batch_size: int = 4,
    micro_batch_size: int = 1,
) -> Recipe:
    """A recipe of three steps at a rate high enough to show a wrong gradient.

    Adam's epsilon is large, so that an update does not enlarge rounding where a gradient is nearly zero.

    Args:
        model: `tiny_model()` if absent.
        parallel: One rank if absent.
        trainable: The parts that learn.
        precision: As `train.precision`.
        global_batch_size: Samples of a step, over all replicas.
        micro_batch_size: Samples of a micro-batch.
    """
    return Recipe(
        model=model or tiny_model(),
        parallel=parallel or ParallelConfig(),
        optimizer=OptimizerConfig(
            lr=1e-2, vision_lr=5e-3, weight_decay=0.1, warmup_fraction=0.0, clip_grad=0.5, epsilon=1e-3
        ),
        train=TrainConfig(
            steps=3,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            seq_length=256,
            precision=precision,
            trainable=trainable,
        ),
    )


def tiny_samples(model: ModelConfig, number: int, seed: int = 0) -> list[TinySample]:
    """Samples with 1, 0, 2, 1, ... images, anywhere in the text.

    Args:
        model: The model that they are for.
        number: How many.
        seed: What they are drawn from.
    """
    rng = np.random.default_rng(seed)
    return [_sample(model, rng, num_images=(1, 0, 2, 1)[index % 4]) for index in range(number)]


def _sample(model: ModelConfig, rng: np.random.Generator, num_images: int) -> TinySample:
    length = int(rng.integers(6, 14))
    tokens = rng.integers(1, model.language.vocab_size, length)
    places = rng.choice(length - 2, num_images, replace=False)
    tokens[places] = IMAGE_TOKEN_ID
    mask = (rng.random(length) < 0.6) & (tokens != IMAGE_TOKEN_ID)
    mask[-1] = True
    candidates = ((2, 2),) if model.variant.traits.stacks_in_vit else GRIDS[:5]
    grids = tuple(candidates[int(rng.integers(len(candidates)))] for _ in range(num_images))
    size = model.vision.image_size
    pixels = tuple(
        rng.integers(0, 256, (num_views(model.variant, grid), size, size, 3), dtype=np.uint8) for grid in grids
    )
    return TinySample(tokens=tokens, loss_mask=mask.astype(np.int64), grids=grids, pixels=pixels)


Images = tuple[np.ndarray, ...]
"""Views of each image of a row."""


def tiny_share(
    samples: list[TinySample], recipe: Recipe, dp: int, num_replicas: int, truncate: bool = False
) -> tuple[list[list[PlannedSample]], list[list[Images]]]:
    """What one replica gets of a global batch, dealt as in training.

    Args:
        samples: The samples of the global batch.
        recipe: Its layout and `train.batching` decide how samples are dealt.
        dp: The replica's number, from 0.
        num_replicas: Number of replicas.
        truncate: Cut samples that are longer than `train.seq_length`.

    Returns:
        Planned samples and images, both by micro-batch and by place in it; a pack is one of these.
    """
    model, train = recipe.model, recipe.train
    planned = [one.planned(model, train.seq_length, truncate) for one in samples]
    lengths = np.array([one.sequence.length for one in planned])
    units = np.array([sum(num_views(model.variant, grid) for grid in one.grids) for one in planned])
    mine = deal(lengths, units, model.language, recipe.parallel, train, num_replicas).replicas[dp]
    rows = [[merge([planned[one] for one in row]) if row else filler() for row in batch] for batch in mine]
    images = [[tuple(image for one in row for image in samples[one].pixels) for row in batch] for batch in mine]
    return rows, images


def unit_pixels(model: ModelConfig, images: list[list[Images]], plan: StepPlan) -> torch.Tensor:
    """The views that a rank encodes in a step.

    Args:
        model: The recipe's model.
        images: As `tiny_share` returns them.
        plan: This rank's plan.

    Returns:
        uint8 (N, S, S, 3), in the order of the plan's units.
    """
    size = model.vision.image_size
    parts = [np.empty((0, size, size, 3), np.uint8)]
    for unit in plan.routes.units:
        parts.append(images[unit.micro_batch][unit.sample][unit.image][list(unit.views)])
    return torch.from_numpy(np.concatenate(parts))
