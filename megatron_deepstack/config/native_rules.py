"""Rules for models whose views have any size: what their tower, decoder and variant require of each other."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.config.sizes import head_width, tokens_per_side, used_layers
from megatron_deepstack.config.traits.families import find_family
from megatron_deepstack.config.traits.towers import find_tower
from megatron_deepstack.config.traits.variants import StackSource, ViewLayout


def native_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with a model of views of any size, or with such a part in another model.

    Args:
        model: The recipe's model.

    Yields:
        A problem for each mistake.
    """
    tower, family = find_tower(model.vision.kind), find_family(model.language.family or "")
    native = model.variant.traits.is_native
    if tower is not None and tower.is_native is not native:
        what = "takes views of any size" if tower.is_native else "takes views of one size"
        yield _problem(
            "model.vision.kind model.variant", f"the tower {model.vision.kind} {what}, {model.variant} does not"
        )
    axial = family is not None and family.has_axial_positions
    if axial is not (model.language.mrope_section is not None):
        yield _problem(
            "model.language.mrope_section model.language.family",
            "set it for a family with positions on three axes, such as qwen3_vl, and for no other",
        )
    if model.vision.tile_grids and model.variant.traits.views is not ViewLayout.TILES:
        yield _problem("model.vision.tile_grids model.variant", f"{model.variant} has no tiles; leave it empty")
    if axial and not native:
        yield _problem(
            "model.language.family model.variant",
            f"{model.language.family} has positions on three axes, which {model.variant} does not give",
        )
    if native:
        yield from _tower(model.vision, None if tower is None else tower.layernorm_epsilon)
    elif model.variant.traits.stack_source is StackSource.TAPS:
        yield from _qformers(model)
        if not model.vision.tile_grids:
            yield _problem(
                "model.vision.tile_grids model.variant",
                f'is empty; name the grids of tiles of {model.variant}, such as ["1x1", "2x1", "1x2"]',
            )
    elif model.vision.taps:
        yield _problem("model.vision.taps model.variant", f"{model.variant} takes no stacks from layers of the tower")
    if axial and model.language.mrope_section is not None:
        yield from _sections(model.language)


def _tower(vision: VisionConfig, epsilon: float | None) -> Iterator[Problem]:
    if vision.num_positions is None:
        yield _problem("model.vision.num_positions", "not set; give the number of learned positions, such as 2304")
    outside = [layer for layer in vision.taps if layer >= vision.num_layers]
    if outside or len(set(vision.taps)) < len(vision.taps):
        yield _problem(
            "model.vision.taps model.vision.num_layers",
            f"found {list(vision.taps)}, expected different layers from 0 to {vision.num_layers - 1}",
        )
    if vision.select_layer not in (-1, vision.num_layers):
        yield _problem("model.vision.select_layer", f"found {vision.select_layer}, expected -1, the last layer")
    if vision.num_heads and vision.hidden_size // vision.num_heads % 4:
        yield _problem(
            "model.vision.hidden_size model.vision.num_heads",
            f"a head is {vision.hidden_size // vision.num_heads} wide; a quarter of it turns by line and a quarter by "
            "column, so it must be a multiple of 4",
        )
    if epsilon is not None and vision.layernorm_epsilon != epsilon:
        yield _problem(
            "model.vision.layernorm_epsilon model.vision.kind",
            f"found {vision.layernorm_epsilon}, and the tower {vision.kind} has {epsilon}",
        )


def _qformers(model: ModelConfig) -> Iterator[Problem]:
    vision, qformer = model.vision, model.qformer
    outside = [layer for layer in vision.taps if layer >= vision.num_layers]
    if outside or not vision.taps:
        yield _problem(
            "model.vision.taps model.vision.num_layers",
            f"found {list(vision.taps)}, expected layers from 0 to {vision.num_layers - 1}, one for each stack",
        )
    elif used_layers(vision) <= max(vision.taps):
        yield _problem(
            "model.vision.select_layer model.vision.taps",
            f"found {vision.select_layer}, expected {max(vision.taps) - vision.num_layers}: the last tapped state",
        )
    if qformer.num_sampled > min(len(vision.taps), 4):
        yield _problem(
            "model.qformer.num_sampled model.vision.taps",
            f"found {qformer.num_sampled}, expected at most 4 and no more than the {len(vision.taps)} stacks",
        )
    if vision.patch_size and tokens_per_side(vision) % qformer.window_side:
        yield _problem(
            "model.qformer.window_side model.vision.image_size model.vision.patch_size",
            f"windows of {qformer.window_side} patches do not divide a view of {tokens_per_side(vision)}",
        )
    if qformer.num_sampled and qformer.window_side != 2 * qformer.query_side:
        yield _problem(
            "model.qformer.query_side model.qformer.window_side",
            f"found {qformer.query_side} of {qformer.window_side}, expected half, as sampled stacks take one of 2x2",
        )
    if qformer.num_heads and vision.hidden_size % qformer.num_heads:
        yield _problem(
            "model.qformer.num_heads model.vision.hidden_size",
            f"{qformer.num_heads} heads do not divide the width {vision.hidden_size}",
        )


def _sections(language: LanguageConfig) -> Iterator[Problem]:
    assert language.mrope_section is not None
    if min(language.mrope_section) < 0 or sum(language.mrope_section) < head_width(language) // 2:
        yield _problem(
            "model.language.mrope_section model.language.head_dim",
            f"found {list(language.mrope_section)}, expected three numbers, together the {head_width(language) // 2} "
            "frequencies of a head",
        )


def _problem(paths: str, text: str) -> Problem:
    return Problem(paths=tuple(paths.split()), text=text)
