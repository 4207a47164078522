"""The rules for a recipe's values, alone and together, that need nothing but the recipe itself.

The check is pure and complete: every rule is tried and every violation is reported. Rules that need the stage plan or
the number of ranks are in `planning.check`. The content of files is checked where they are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, reduce
from operator import attrgetter
from typing import Any

from megatron_deepstack.config import evaluation_rules, speed_rules
from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    GridRule,
    Part,
    Recompute,
    RecomputeModule,
    Switch,
)
from megatron_deepstack.config.expert_rules import expert_layout_problems, expert_problems, unsupported_with_experts
from megatron_deepstack.config.fields import Field, leaves
from megatron_deepstack.config.native_rules import native_problems
from megatron_deepstack.config.problems import Problem, raise_problems
from megatron_deepstack.config.rope_scaling import rope_problems
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import head_width, nearest_divisor, sequence_multiple, smallest_context
from megatron_deepstack.config.traits.families import find_family, fits, unknown_family
from megatron_deepstack.config.traits.towers import find_tower, unknown_tower
from megatron_deepstack.config.traits.variants import variant_without_crops
from megatron_deepstack.errors import ConfigError, LayoutError


def find_problems(recipe: Recipe, sections: tuple[str, ...] = ("",)) -> list[Problem]:
    """Find what is wrong with a recipe. A rule between fields is tried only where each is in its own range.

    Args:
        recipe: The recipe.
        sections: What the paths of fields begin with that may be out of their own ranges, as for `out_of_range`. Rules
            between fields are tried for all sections.

    Returns:
        All problems.
    """
    found = list(out_of_range(recipe, sections))
    bad = [problem.paths[0] for problem in found]
    for rule in _RULES:
        found += [problem for problem in rule(recipe) if not any(problem.concerns(path) for path in bad)]
    return found


def require(recipe: Recipe, paths: tuple[str, ...], verb: str) -> None:
    """Make sure that the fields which a command needs are set.

    Args:
        recipe: The recipe.
        paths: Dotted paths of the fields.
        verb: Name of the command, for the message.

    Raises:
        ConfigError: One of the fields is null or empty. All such fields are named.
    """
    absent = [path for path in paths if value_at(recipe, path) in (None, "", ())]
    raise_problems(
        [
            Problem(paths=(path,), text=f"is not set, and `{verb}` needs it; set it in the recipe or add {path}=...")
            for path in absent
        ]
    )


def value_at(recipe: Recipe, path: str) -> object:
    """Return the value of one field.

    Args:
        recipe: The recipe.
        path: Dotted path of the field, such as `train.steps`.

    Returns:
        The value, or the section's dataclass if `path` names a section.
    """
    return reduce(getattr, path.split("."), recipe)  # type: ignore[arg-type]


def out_of_range(recipe: Recipe, sections: tuple[str, ...] = ("",)) -> Iterator[Problem]:
    """Yield a problem for each field whose value is outside its own range. The schema declares the ranges.

    Args:
        recipe: The recipe.
        sections: What the paths of the fields that are looked at begin with, such as `parallel.`; all by default.

    Yields:
        The problems.
    """
    for field, get in _constrained(sections):
        kind, value = field.type, get(recipe)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        expected = ""
        if kind.range is not None and not all(map(kind.range.holds, values)):
            expected = f"{kind.range} ({kind.unit})" if kind.unit else str(kind.range)
        elif kind.form is not None and not all(map(kind.form.holds, values)):
            expected = kind.form.words
        if expected:
            shown = list(value) if isinstance(value, tuple) else repr(value) if isinstance(value, str) else value
            yield Problem(paths=(field.path,), text=f"found {shown}, expected {expected}")
        if kind.not_blank and not str(value).strip():
            yield Problem(paths=(field.path,), text="is empty, expected text")


@cache
def _constrained(sections: tuple[str, ...]) -> tuple[tuple[Field, Callable[[Recipe], Any]], ...]:
    """The fields of sections that may not hold every value of their type, and how to look them up."""
    bounded = (one for one in leaves(Recipe) if one.type.range or one.type.form or one.type.not_blank)
    return tuple((one, attrgetter(one.path)) for one in bounded if one.path.startswith(sections))


def _problem(paths: str, text: str, kind: type[ConfigError] = ConfigError) -> Problem:
    return Problem(paths=tuple(paths.split()), text=text, kind=kind)


def _vision(recipe: Recipe) -> Iterator[Problem]:
    vision = recipe.model.vision
    if vision.patch_size > vision.image_size:
        yield _problem(
            "model.vision.image_size model.vision.patch_size",
            f"a view of {vision.image_size} pixels holds no patch of {vision.patch_size}; "
            f"use {vision.patch_size} pixels or more",
        )
    if vision.num_heads and vision.hidden_size % vision.num_heads:
        yield _problem(
            "model.vision.num_heads model.vision.hidden_size",
            f"{vision.num_heads} heads do not divide model.vision.hidden_size {vision.hidden_size}",
        )
    if not (-vision.num_layers <= vision.select_layer <= -1 or 1 <= vision.select_layer <= vision.num_layers):
        yield _problem(
            "model.vision.select_layer model.vision.num_layers",
            f"found {vision.select_layer}, expected -1 (the last layer's output) to -{vision.num_layers} "
            f"(the first layer's output), or 1 to {vision.num_layers} counted up from there",
        )
    tower = find_tower(vision.kind)
    if tower is None:
        yield _problem("model.vision.kind", unknown_tower(vision.kind))
    elif vision.activation not in tower.activations:
        known = ", ".join(tower.activations)
        yield _problem(
            "model.vision.activation model.vision.kind",
            f"found {vision.activation}, expected one of {known}, which the tower {vision.kind} may have",
        )


def _language(recipe: Recipe) -> Iterator[Problem]:
    language = recipe.model.language
    heads, width, kv_heads = language.num_heads, language.hidden_size, language.num_kv_heads
    if language.head_dim is None and heads and width % heads:
        yield _problem(
            "model.language.num_heads model.language.hidden_size model.language.head_dim",
            f"{heads} heads do not divide model.language.hidden_size {width}; change one, or set head_dim",
        )
    elif heads and head_width(language) % 2:
        yield _problem(
            "model.language.head_dim model.language.num_heads model.language.hidden_size",
            f"a head is {head_width(language)} wide; the rotary embedding turns pairs, so it must be even",
        )
    if kv_heads and heads % kv_heads:
        yield _problem(
            "model.language.num_kv_heads model.language.num_heads",
            f"{kv_heads} key/value heads do not divide model.language.num_heads {heads}",
        )
    yield from rope_problems(language.rope_scaling)
    yield from _family(language)


def _family(language: LanguageConfig) -> Iterator[Problem]:
    if language.family is None:
        return
    family = find_family(language.family)
    if family is None:
        yield _problem("model.language.family", unknown_family(language.family))
    elif not fits(language, family):
        wanted = family.switches
        shown = ", ".join(f"{name}: {str(value).lower()}" for name, value in wanted.items())
        yield _problem(
            " ".join(("model.language.family", *(f"model.language.{name}" for name in wanted))),
            f"{language.family} has {shown}; set these, or leave the family out, which then follows from them",
        )


def _stacks(recipe: Recipe) -> Iterator[Problem]:
    stacks, variant = recipe.model.stacks, recipe.model.variant
    least = 4 if stacks.grid is GridRule.FIXED_2X2 else 2
    if variant.traits.has_crops and stacks.num_crops < least:
        yield _problem(
            "model.stacks.num_crops model.stacks.grid model.variant",
            f"{stacks.num_crops} leaves no grid of crops under grid rule {stacks.grid}, which needs at least {least}; "
            f"for a model without crops use model.variant={variant_without_crops()}",
        )
    if variant.traits.stacks_in_vit and stacks.grid is not GridRule.FIXED_2X2:
        yield _problem(
            "model.stacks.grid model.variant",
            f"{stacks.grid} gives images different numbers of crops, and {variant} needs four of each; "
            f"use {GridRule.FIXED_2X2}",
        )


def _native(recipe: Recipe) -> Iterator[Problem]:
    yield from native_problems(recipe.model)
    if recipe.data.min_pixels > recipe.data.max_pixels:
        yield _problem(
            "data.min_pixels data.max_pixels",
            f"found {recipe.data.min_pixels} and {recipe.data.max_pixels}; the first cannot exceed the second",
        )


def _experts(recipe: Recipe) -> Iterator[Problem]:
    yield from expert_problems(recipe.model)
    yield from expert_layout_problems(recipe.model.language, recipe.parallel)
    yield from unsupported_with_experts(recipe)


def _layout(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    for name, size in _split_by_tensor(recipe.model.language).items():
        if parallel.tensor and size % parallel.tensor:
            yield _problem(
                f"parallel.tensor {name}",
                f"{parallel.tensor} tensor-parallel ranks do not divide {name} {size}; "
                f"use {nearest_divisor(size, parallel.tensor)}",
                LayoutError,
            )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield _problem(
            "parallel.virtual_pipeline parallel.pipeline",
            f"{parallel.virtual_pipeline} chunks per stage need at least 2 pipeline stages; "
            f"set parallel.pipeline, or virtual_pipeline=1",
            LayoutError,
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield _problem(
            "parallel.sequence_parallel parallel.tensor",
            "splits activations over tensor-parallel ranks, of which there is 1; set parallel.tensor, or false",
            LayoutError,
        )
    if parallel.encoder_placement is EncoderPlacement.INLINE and parallel.context > 1:
        yield _problem(
            "parallel.encoder_placement parallel.context",
            f"inline runs the tower inside the first stage, which is split over {parallel.context} context-parallel "
            f"ranks here; use spread",
            LayoutError,
        )
    for name in ("encoder_chunk_views", "encoder_memory_gib"):
        bound = getattr(parallel, name)
        if parallel.encoder_placement is EncoderPlacement.INLINE and bound:
            yield _problem(
                f"parallel.{name} parallel.encoder_placement",
                f"{bound:g} bounds nothing under inline, which keeps the activations of all views of "
                f"a micro-batch for the schedule's own backward; set 0, or use spread",
                LayoutError,
            )
    if parallel.encoder_placement is EncoderPlacement.INLINE and parallel.rows_on_host is Switch.ALWAYS:
        yield _problem(
            "parallel.rows_on_host parallel.encoder_placement",
            "always keeps received rows on the host, and inline receives none; set auto, or use spread",
            LayoutError,
        )
    if parallel.encoder_chunk_views and parallel.encoder_memory_gib:
        yield _problem(
            "parallel.encoder_memory_gib parallel.encoder_chunk_views",
            f"{parallel.encoder_memory_gib:g} GiB and {parallel.encoder_chunk_views} views both bound the tower's "
            f"activations; set one of them to 0",
            LayoutError,
        )
    yield from _sequence_split(recipe.train.seq_length, parallel)


def _split_by_tensor(language: LanguageConfig) -> dict[str, int]:
    """Return the sizes that tensor parallelism divides evenly, by the path of their field."""
    kv_heads = {} if language.num_kv_heads is None else {"model.language.num_kv_heads": language.num_kv_heads}
    return {
        "model.language.num_heads": language.num_heads,
        **kv_heads,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
    }


def _sequence_split(seq_length: int, parallel: ParallelConfig) -> Iterator[Problem]:
    shards = sequence_multiple(parallel)
    if shards and seq_length % shards:
        lower = seq_length // shards * shards
        yield _problem(
            "train.seq_length parallel.context parallel.sequence_parallel parallel.tensor",
            f"{seq_length} tokens do not split into {shards} equal shards (tensor {parallel.tensor} if "
            f"sequence_parallel, times 2 x context {parallel.context} if above 1); use {lower or shards} "
            f"or {lower + shards}",
            LayoutError,
        )


def _training(recipe: Recipe) -> Iterator[Problem]:
    train, vision, optimizer = recipe.train, recipe.model.vision, recipe.optimizer
    if train.micro_batch_size and train.global_batch_size % train.micro_batch_size:
        yield _problem(
            "train.global_batch_size train.micro_batch_size",
            f"{train.global_batch_size} is not a multiple of train.micro_batch_size {train.micro_batch_size}",
        )
    tokens = smallest_context(recipe.model) if vision.patch_size and recipe.model.qformer.window_side else 0
    if tokens >= train.seq_length:
        yield _problem(
            "train.seq_length model.vision.image_size model.vision.patch_size",
            f"{train.seq_length} tokens cannot hold one image of {tokens} visual tokens or more (a view has "
            f"{vision.image_size} pixels, in patches of {vision.patch_size}) and any text",
        )
    if train.batching is Batching.PACKED and train.micro_batch_size > 1:
        yield _problem(
            "train.micro_batch_size train.batching",
            f"{train.micro_batch_size} with train.batching=packed, where a row is a micro-batch; set "
            f"train.micro_batch_size=1, or train.batching=padded",
            LayoutError,
        )
    if not train.trainable or len(set(train.trainable)) < len(train.trainable):
        yield _problem(
            "train.trainable",
            f"found [{', '.join(train.trainable)}], expected at least one of vision, projector, language, each once",
        )
    for paths, text in speed_rules.moment_violations(optimizer, recipe.parallel, train.precision):
        yield _problem(paths, text)
    if optimizer.min_lr > optimizer.lr:
        yield _problem(
            "optimizer.min_lr optimizer.lr", f"{optimizer.min_lr} is above the peak optimizer.lr {optimizer.lr}"
        )
    if train.validation_interval and recipe.data.validation_store is None:
        yield _problem(
            "train.validation_interval data.validation_store",
            f"evaluates every {train.validation_interval} steps on data.validation_store, which is not set",
        )


def _adapters(recipe: Recipe) -> Iterator[Problem]:
    lora, trainable = recipe.lora, recipe.train.trainable
    wanted = {
        Part.LANGUAGE: ("lora.targets", bool(lora.targets), "[]"),
        Part.VISION: ("lora.vision_targets", bool(lora.vision_targets), "[]"),
        Part.PROJECTOR: ("lora.projector", lora.projector, "false"),
    }
    if not lora.rank:
        for part, (field, has, none) in wanted.items():
            if has and part is not Part.LANGUAGE:
                yield _problem(f"{field} lora.rank", f"is set, and lora.rank is 0; set lora.rank, or {field}={none}")
        return
    if not any(has for _, has, _ in wanted.values()) or (Part.LANGUAGE in trainable and not lora.targets):
        yield _problem("lora.targets lora.rank", "is empty, and lora.rank is set; name layers, or set lora.rank=0")
    for part, (field, has, none) in wanted.items():
        if has and part not in trainable:
            yield _problem(
                f"{field} lora.rank train.trainable",
                f"train.trainable has no `{part}`, whose adapters would never learn; add it, or set {field}={none} (or "
                "lora.rank=0 for no adapters at all)",
            )


def _stores(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.store is not None and data.stores is not None:
        yield _problem("data.stores data.store", "both are set; `stores` takes the place of `store`: set one to null")
    if data.stores is not None and not data.stores:
        yield _problem("data.stores", "is an empty list; name the stores, or use data.store")
    if data.weights is not None and len(data.weights) != len(data.stores or ()):
        yield _problem(
            "data.weights data.stores",
            f"{len(data.weights)} weights for {len(data.stores or ())} data.stores; give one for each, or none",
        )


def _speed(recipe: Recipe) -> Iterator[Problem]:
    for paths, text in speed_rules.violations(
        recipe.speed, recipe.model.language, recipe.parallel, recipe.train.precision, recipe.lora
    ):
        yield _problem(paths, text)
    if recipe.parallel.recompute is Recompute.SELECTIVE and not recipe.parallel.recompute_modules:
        yield _problem(
            "parallel.recompute_modules parallel.recompute",
            f"is empty, and recompute is selective; name at least one of {', '.join(RecomputeModule)}",
        )
    for paths, text in speed_rules.shape_violations(recipe):
        yield _problem(paths, text)
    for paths, text in speed_rules.kept_violations(recipe.model.language, recipe.parallel, recipe.train.precision):
        yield _problem(paths, text)


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    for paths, text in evaluation_rules.violations(recipe):
        yield _problem(paths, text)


_RULES = (_vision, _language, _experts, _stacks, _native, _layout, _speed, _training, _adapters, _stores, _evaluation)
