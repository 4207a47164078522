"""Tiny models and samples for tests, which train in a second on four CPU ranks.

Their sizes are uneven, so that a mistake shows. Samples have no image, one, or several, anywhere in the text, on
different grids. Everything is drawn from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_deepstack.config.choices import Activation, Batching, Part, Precision, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    QFormerConfig,
    Recipe,
    StackConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.config.sizes import sample_multiple
from megatron_deepstack.planning.batch.dealing import deal
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import Grid, context_length
from megatron_deepstack.planning.views import ImageShape, ViewGrid, ViewLayout, num_views, read_tile_grids, tile_grid

GRIDS: tuple[Grid, ...] = ((2, 2), (1, 2), (3, 1), (2, 1), (4, 1), (1, 1))
PATCHES = tuple(ViewGrid(frames=1, height=h, width=w) for h, w in ((2, 2), (4, 6), (6, 2), (2, 8), (4, 4)))
"""Patches of views of any size; every side is a multiple of the merge size."""


@dataclass(frozen=True, slots=True)
class TinySample:
    """A sample that carries its own pixels instead of lying in a store."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    grids: tuple[ImageShape, ...]
    pixels: tuple[np.ndarray, ...]
    """Per image uint8 (views, S, S, 3), or of views of any size (1, height, width, 3)."""

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


def tiny_qwen3_vl(**changes: object) -> ModelConfig:
    """A Qwen3-VL of six decoder layers of width 32 and a tower of four, with two taps.

    Args:
        **changes: Fields of `ModelConfig` that are to be otherwise.
    """
    settings: dict[str, object] = {
        "variant": Variant.QWEN3_VL,
        "vision": VisionConfig(
            kind="qwen3_vl",
            patch_size=4,
            temporal_patch_size=2,
            merge_size=2,
            hidden_size=24,
            ffn_hidden_size=40,
            num_layers=4,
            num_heads=3,
            num_positions=20,
            taps=(0, 2),
            select_layer=-1,
            activation=Activation.GELU_TANH,
            layernorm_epsilon=1e-6,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        "language": LanguageConfig(
            family="qwen3_vl",
            vocab_size=61,
            hidden_size=32,
            ffn_hidden_size=48,
            num_layers=8,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            norm_epsilon=1e-6,
            rope_theta=1e4,
            mrope_section=(4, 2, 2),
            qk_norm=True,
        ),
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_qwen3_vl_moe(**changes: object) -> ModelConfig:
    """`tiny_qwen3_vl` with six experts in each layer, of which a token passes two.

    The loss that balances them weighs much more than the published one, so that a mistake in it shows.

    Args:
        **changes: Fields of the decoder that are to be otherwise.
    """
    dense = tiny_qwen3_vl()
    settings: dict[str, object] = {
        "family": "qwen3_vl_moe",
        "num_experts": 6,
        "num_active_experts": 2,
        "expert_ffn_hidden_size": 20,
        "balance_loss": 0.1,
    }
    language = replace(dense.language, **{**settings, **changes})  # type: ignore[arg-type]
    return replace(dense, variant=Variant.QWEN3_VL_MOE, language=language)


def tiny_granite(**changes: object) -> ModelConfig:
    """A Granite 4 Vision of eight decoder layers of width 32, whose six stacks reach all of them and four stages.

    Args:
        **changes: Fields of `ModelConfig` that are to be otherwise.
    """
    settings: dict[str, object] = {
        "variant": Variant.GRANITE4_VISION,
        "vision": VisionConfig(
            kind="siglip",
            image_size=16,
            patch_size=4,
            hidden_size=64,
            ffn_hidden_size=40,
            num_layers=4,
            num_heads=4,
            taps=(0, 2, 3, 3, 3, 3),
            tile_grids=("1x1", "2x1", "3x1", "1x2", "2x2", "1x3"),
            select_layer=-1,
            activation=Activation.GELU_TANH,
            layernorm_epsilon=1e-6,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        "language": LanguageConfig(
            family="granite",
            vocab_size=61,
            hidden_size=32,
            ffn_hidden_size=48,
            num_layers=8,
            num_heads=4,
            num_kv_heads=2,
            norm_epsilon=1e-5,
            embedding_multiplier=6.0,
            attention_multiplier=0.2,
            residual_multiplier=0.35,
            logits_scaling=3.0,
        ),
        "stacks": StackConfig(slots=(5, 0, 2, 4, 6, 7)),
        "qformer": QFormerConfig(query_side=1, window_side=2, num_heads=1, ffn_hidden_size=48),
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
    grids = tuple(_shape(model, rng) for _ in range(num_images))
    pixels = tuple(rng.integers(0, 256, _pixels_of(model, grid), dtype=np.uint8) for grid in grids)
    return TinySample(tokens=tokens, loss_mask=mask.astype(np.int64), grids=grids, pixels=pixels)


def _shape(model: ModelConfig, rng: np.random.Generator) -> ImageShape:
    if model.variant.traits.is_native:
        return PATCHES[int(rng.integers(len(PATCHES)))]
    if model.variant.traits.views is ViewLayout.TILES:
        side, grids = model.vision.image_size, read_tile_grids(model.vision.tile_grids)
        width, height = (int(rng.integers(1, 4 * side)) for _ in range(2))
        return tile_grid(width, height, side, grids)
    candidates = ((2, 2),) if model.variant.traits.stacks_in_vit else GRIDS[:5]
    return candidates[int(rng.integers(len(candidates)))]


def _pixels_of(model: ModelConfig, shape: ImageShape) -> tuple[int, int, int, int]:
    """Shape of an image's pixels: views, height, width, channels."""
    if isinstance(shape, ViewGrid):
        width, height = shape.pixel_size(model.vision.patch_size)
        return 1, height, width, 3
    size = model.vision.image_size
    return num_views(model.variant, shape), size, size, 3


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
    mine = deal(lengths, units, model.language, recipe.parallel, train, num_replicas).replica(dp)
    least = sample_multiple(recipe.parallel) if train.batching is Batching.PACKED else 1
    rows = [[merge([planned[one] for one in row], least) if row else filler(least) for row in batch] for batch in mine]
    images = [[tuple(image for one in row for image in samples[one].pixels) for row in batch] for batch in mine]
    return rows, images


def unit_pixels(model: ModelConfig, images: list[list[Images]], plan: StepPlan) -> torch.Tensor:
    """The views that a rank encodes in a step.

    Args:
        model: The recipe's model.
        images: As `tiny_share` returns them.
        plan: This rank's plan.

    Returns:
        uint8 (N, S, S, 3), in the order of the plan's units; of views of any size all values in one dimension.
    """
    if model.variant.traits.is_native:
        chosen = [images[u.micro_batch][u.sample][u.image][list(u.views)] for u in plan.routes.units]
        return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *(one.reshape(-1) for one in chosen)]))
    size = model.vision.image_size
    parts = [np.empty((0, size, size, 3), np.uint8)]
    for unit in plan.routes.units:
        parts.append(images[unit.micro_batch][unit.sample][unit.image][list(unit.views)])
    return torch.from_numpy(np.concatenate(parts))
