"""The whole model for one sample at a time: views to visual rows, rows and text to logits, logits to loss.

An image becomes base rows, which take its placeholder's place in the sequence, and stacks of as many rows, which are
added to the hidden states at the same positions before later layers. Several images, images anywhere in the text and
text alone all follow from that rule.

Shapes: N views of an image, V rows of an image, T expanded sequence, W vision width, H decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle import language, stacks, vision
from megatron_deepstack.testing.oracle.stacks import Grid


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OracleSample:
    """One unpadded sample before its placeholders are expanded."""

    tokens: Tensor
    """(t,) int64 token ids; -200 stands for one image each."""
    labels: Tensor
    """(t,) int64; the token itself where it is a target, -100 elsewhere and at placeholders."""
    pixel_values: Tensor | None = None
    """(views of all images in order, 3, image_size, image_size) normalised pixels; None without images."""
    grids: tuple[Grid, ...] = ()
    """Grid (columns, rows) of each image."""


def oracle_forward(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    samples: Sequence[OracleSample],
    *,
    max_tokens: int | None = None,
) -> list[Tensor]:
    """Logits of each sample, one sample at a time. Gradients flow to the weights and the pixels.

    Args:
        model: The recipe's model.
        weights: Every tensor under its published name; their dtype is the dtype of the computation.
        samples: What is computed.
        max_tokens: Length to which expanded samples are cut, or None.

    Returns:
        For each sample (T, vocabulary), where T counts the tokens after placeholders are expanded.
    """
    return [_forward_sample(model, weights, sample, max_tokens) for sample in samples]


def oracle_loss(
    model: ModelConfig, logits: Sequence[Tensor], samples: Sequence[OracleSample], *, max_tokens: int | None = None
) -> Tensor:
    """The loss of a batch: the sum of the next-token losses of all samples over the number of their targets.

    Args:
        model: The recipe's model.
        logits: As `oracle_forward` returns them.
        samples: The same samples.
        max_tokens: As for `oracle_forward`.

    Returns:
        A scalar, in the dtype of the logits.
    """
    sums, num_targets = [], 0
    for sample_logits, sample in zip(logits, samples, strict=True):
        targets = expand_labels(model, sample)[1:max_tokens]
        sums.append(F.cross_entropy(sample_logits[:-1], targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        num_targets += int((targets != IGNORE_INDEX).sum())
    return torch.stack(sums).sum() / num_targets


def expand_labels(model: ModelConfig, sample: OracleSample) -> Tensor:
    """Labels of the whole sequence: each placeholder becomes as many ignored labels as its image has rows.

    Args:
        model: The recipe's model.
        sample: The sample.

    Returns:
        (T,) int64; -100 where nothing is a target.
    """
    pieces, grids = [], iter(sample.grids)
    for token, label in zip(sample.tokens.tolist(), sample.labels.tolist(), strict=True):
        pieces += [IGNORE_INDEX] * num_rows_of_image(model, next(grids)) if token == IMAGE_TOKEN_ID else [label]
    return torch.tensor(pieces, dtype=torch.long)


def num_rows_of_image(model: ModelConfig, grid: Grid) -> int:
    """V, the sequence positions that an image occupies.

    Args:
        model: The recipe's model.
        grid: Columns and rows of the image's crops.

    Returns:
        Base rows of the image; stacks occupy no positions of their own.
    """
    side = vision.num_patches_per_side(model.vision)
    if model.variant is Variant.IN_SEQUENCE:
        return side * side * (1 + grid[0] * grid[1])
    if model.variant in (Variant.DEEPSTACK_HD, Variant.LLAVA_ANYRES):
        return side * side + grid[1] * side * (grid[0] * side + 1)
    return side * side


def image_rows(
    model: ModelConfig, weights: Mapping[str, Tensor], pixels_N3HW: Tensor, grid: Grid
) -> tuple[Tensor, list[Tensor]]:
    """What one image becomes.

    Args:
        model: The recipe's model.
        weights: Tensors by published name.
        pixels_N3HW: Normalised pixels of all views of the image, in the order in which a store has them.
        grid: Columns and rows of its crops.

    Returns:
        The base rows (V, H), and all its stacks, each (V, H). Stacks that the grid does not fill are absent.
    """
    if model.variant is Variant.DEEPSTACK_V:
        return _rows_stacked_in_vit(model, weights, pixels_N3HW, grid), []
    views_NVH = vision.project(weights, vision.encode_views(model.vision, weights, pixels_N3HW))
    if model.variant is Variant.LLAVA:
        return views_NVH[0], []
    if model.variant is Variant.DEEPSTACK_L:
        return views_NVH[0], stacks.sample_stacks(views_NVH[1:], grid, model.stacks.sampler)
    if model.variant is Variant.IN_SEQUENCE:
        return torch.cat([views_NVH[0], *stacks.sample_stacks(views_NVH[1:], grid, model.stacks.sampler)]), []
    if model.variant in (Variant.DEEPSTACK_HD, Variant.LLAVA_ANYRES):
        return _any_resolution_rows(model, views_NVH, grid, weights["model.image_newline"])
    raise NotImplementedError(f"the oracle does not define variant {model.variant}")


def _any_resolution_rows(
    model: ModelConfig, views_NVH: Tensor, grid: Grid, newline: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Every stack has the context's layout, newline included, which is therefore added again with each stack."""
    num_context = 1 + grid[0] * grid[1]
    base = stacks.any_resolution_layout(views_NVH[:num_context], grid, newline)
    side = stacks.HIGH_RES_SIDE
    high_res = views_NVH[num_context:].unflatten(0, (-1, side * side)) if len(views_NVH) > num_context else []
    by_view = [stacks.sample_stacks(crops, (side, side), model.stacks.sampler) for crops in high_res]
    by_stack = [torch.stack(same_k) for same_k in zip(*by_view, strict=True)]
    return base, [stacks.any_resolution_layout(views, grid, newline) for views in by_stack]


def _rows_stacked_in_vit(model: ModelConfig, weights: Mapping[str, Tensor], pixels_N3HW: Tensor, grid: Grid) -> Tensor:
    """DeepStack-V: all views share the layers before slot 0, where the crops become stacks of the global view."""
    hidden_NTW = vision.embed_views(model.vision, weights, pixels_N3HW)
    slots = [stacks.slot_of_stack(model.stacks, k) for k in range(grid[0] * grid[1])]
    hidden_NTW = vision.run_layers(model.vision, weights, range(slots[0]), hidden_NTW)
    crops = hidden_NTW[1:, vision.num_leading_tokens(model.vision) :]
    sampled = stacks.sample_stacks(crops, grid, model.stacks.sampler)
    features_1VW = vision.add_stacks_in_vit(model.vision, weights, hidden_NTW[:1], sampled, slots)
    return vision.project(weights, features_1VW)[0]


def _forward_sample(
    model: ModelConfig, weights: Mapping[str, Tensor], sample: OracleSample, max_tokens: int | None
) -> Tensor:
    hidden_TH, additions = embed_sample(model, weights, sample)
    cut = {layer: rows_TH[None, :max_tokens] for layer, rows_TH in additions.items()}
    return language.decode(model.language, weights, hidden_TH[None, :max_tokens], cut)[0]


def embed_sample(
    model: ModelConfig, weights: Mapping[str, Tensor], sample: OracleSample
) -> tuple[Tensor, dict[int, Tensor]]:
    """A sample as the decoder's input, and what is added to it later.

    Args:
        model: The recipe's model.
        weights: Tensors by published name.
        sample: The sample.

    Returns:
        The decoder's input (T, H); and by the number of a layer, what is added before it (T, H), zero outside images.
    """
    images = _images_of(model, sample)
    pieces: list[tuple[Tensor, list[Tensor]]] = []
    for token in sample.tokens:
        if token == IMAGE_TOKEN_ID:
            pixels, grid = images.pop(0)
            base, image_stacks = image_rows(model, weights, pixels, grid)
            pieces.append((base, image_stacks[: model.stacks.num_stacks]))
        else:
            pieces.append((language.embed_tokens(weights, token[None]), []))
    assert not images, f"{len(images)} images have no placeholder among the {len(sample.tokens)} tokens"
    additions: dict[int, Tensor] = {}
    for k in range(max(len(image_stacks) for _, image_stacks in pieces)):
        rows = [image_stacks[k] if k < len(image_stacks) else torch.zeros_like(base) for base, image_stacks in pieces]
        layer = stacks.slot_of_stack(model.stacks, k)
        additions[layer] = additions.get(layer, 0) + torch.cat(rows)
    return torch.cat([base for base, _ in pieces]), additions


def _images_of(model: ModelConfig, sample: OracleSample) -> list[tuple[Tensor, Grid]]:
    num_placeholders = int((sample.tokens == IMAGE_TOKEN_ID).sum())
    assert num_placeholders == len(sample.grids), f"{num_placeholders} placeholders, {len(sample.grids)} grids"
    if sample.pixel_values is None:
        return []
    counts = [stacks.num_views_of_image(model.variant, grid) for grid in sample.grids]
    return list(zip(sample.pixel_values.split(counts), sample.grids, strict=True))
