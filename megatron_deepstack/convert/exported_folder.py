"""A folder of weights as a whole: the model that its config.json describes, how its data was prepared, its tensors.

This is the way in for everything that has a folder and no recipe: conversion between layouts, and answers from an
exported folder. What the config says becomes the section `model` of a recipe by the same tables that write a config,
and is then compared with the config key by key, so that nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.architectures import VISION
from megatron_deepstack.config.build import build_recipe
from megatron_deepstack.config.check import out_of_range
from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.rope_scaling import rope_problems
from megatron_deepstack.config.schema import DataConfig, ModelConfig
from megatron_deepstack.config.traits.families import FAMILIES
from megatron_deepstack.config.traits.towers import TOWERS
from megatron_deepstack.config.traits.variants import Variant, published_variant
from megatron_deepstack.convert.chat_template import chat_template
from megatron_deepstack.convert.export_files import CHAT_TEMPLATE, FINGERPRINT, PROBE
from megatron_deepstack.convert.hf_config import RELEASES, read_config, require_same_model
from megatron_deepstack.convert.hf_facts import ACTIVATIONS, CONFIG, PREPROCESSOR
from megatron_deepstack.convert.hf_names import by_published_name
from megatron_deepstack.convert.hf_rope import rope_scaling, rotary_base
from megatron_deepstack.convert.hf_whole import WHOLE_MODELS
from megatron_deepstack.convert.hf_whole_folder import described_whole, read_beside
from megatron_deepstack.convert.hf_written import DEEPSTACK
from megatron_deepstack.convert.stacked_experts import is_of_expert, is_stack, read_expert
from megatron_deepstack.convert.tensor_files import LazyTensor, files_by_name, lazy_tensor
from megatron_deepstack.convert.vocabulary import EMBEDDINGS, text_rows, without_placeholders
from megatron_deepstack.data.text.tokenizer_files import tokenizer_in
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.published_shapes import published_shapes

_SHOWN: Final = 6
"""Names that a message lists."""
_UNLIMITED: Final = 1 << 30
OF_DATA: Final = ("template", "resize", "orientation", "deep_grey", "transparency", "max_image_pixels")
"""Fields of `data` that an export records in its config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFolder:
    """A folder of weights without a recipe."""

    path: Path
    model: ModelConfig
    """What its config.json describes."""
    data: DataConfig
    """How images and conversations are prepared, as far as the folder says; the defaults of a recipe otherwise."""
    seq_length: int | None
    """Longest sequence, if the folder says it."""
    unsaid: tuple[str, ...]
    """Fields of `data` that decide about pixels and prompts, and of which the folder says nothing."""
    tokenizer: Path | None
    """Its tokenizer, for `load_tokenizer`."""
    probe: str | None
    """What `data.text.probe.probe` gave for the tokenizer of the training, if the folder says it."""
    fingerprint: str | None
    """Fingerprint of that tokenizer, which stores made with it record."""
    tensors: Mapping[str, LazyTensor]
    """Every tensor of the model by its published name, in the dtype of the files."""
    left_over: tuple[str, ...]
    """Names of the tensors that the model does not use."""


def read_exported(path: str | Path) -> ExportedFolder:
    """Open a folder of weights. Shapes and names are read, and tensors when they are asked for.

    Args:
        path: A folder that `export` wrote, under any names, or one of transformers' LLaVA or whole models such as
            Qwen3-VL, or of the DeepStack and LLaVA releases.

    Returns:
        The folder.

    Raises:
        CheckpointError: The config describes no model of ours, tensors are missing or have other shapes, or a file is
            damaged.
    """
    folder = Path(path)
    config = read_config(folder)
    if not folder.is_dir() or not config:
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG} and weights, as `export` writes it")
    said = _prepared(config, folder)
    if config.get("model_type") in WHOLE_MODELS:
        model, data, known = described_whole(folder, {name: said[name] for name in OF_DATA if name in said})
    else:
        model, data = _described(config, said, read_beside(folder / PREPROCESSOR), folder)
        known = frozenset(said)
    require_same_model(config, model, str(folder), _UNLIMITED)
    files = files_by_name(folder)
    _require_tensors_of_all_layers(folder, model, len(files))
    names = by_published_name(files, str(folder), model)
    expected = published_shapes(model)
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of the model are missing: {_listed(missing)}; complete the folder (a "
            "checkpoint that is still being written lacks files), or name it with others in train.init_from"
        )
    rows = text_rows(config)
    tensors = {name: _fitted(folder, files, names[name], name, shape, rows) for name, shape in expected.items()}
    used = {names[name] for name in expected}
    return ExportedFolder(
        path=folder,
        model=model,
        data=data,
        unsaid=tuple(name for name in _asked_of(model) if name not in known),
        seq_length=_longest(config.get("text_config") or config, folder),
        tokenizer=tokenizer_in(folder),
        probe=said.get(PROBE),
        fingerprint=said.get(FINGERPRINT),
        tensors=tensors,
        left_over=tuple(name for name in files if name not in used),
    )


def _require_tensors_of_all_layers(folder: Path, model: ModelConfig, num_tensors: int) -> None:
    """Refuse a config of more layers than there can be, before the names of all their tensors are written down."""
    layers = model.language.num_layers + model.vision.num_layers
    if layers > num_tensors:
        raise CheckpointError(
            f"{folder}: {CONFIG} describes {layers} layers, and the files hold {num_tensors} tensors; one of the two "
            "is damaged, or files are missing"
        )


def _asked_of(model: ModelConfig) -> tuple[str, ...]:
    """Fields of `data` that decide about pixels and prompts."""
    return (*OF_DATA, *(("min_pixels", "max_pixels") if model.variant.traits.is_native else ()))


def _longest(text: Mapping[str, Any], folder: Path) -> int | None:
    """The longest sequence, if the config says one."""
    found = text.get("max_position_embeddings")
    if found is not None and not (isinstance(found, int) and found > 0):
        raise CheckpointError(
            f"{folder / CONFIG}: max_position_embeddings: found {found!r}, expected a number of tokens above 0"
        )
    return found


def _fitted(
    folder: Path, files: Mapping[str, Path], own: str, name: str, shape: tuple[int, ...], rows: int | None
) -> LazyTensor:
    tensor = lazy_tensor(files[own], own)
    if is_stack(own) and is_of_expert(name):
        return LazyTensor(shape, tensor.dtype, partial(read_expert, files[own], own, name, shape))
    while len(tensor.shape) > len(shape) and tensor.shape[0] == 1:
        tensor = tensor.changed(tensor.shape[1:], lambda read: read[0])
    if name in EMBEDDINGS:
        tensor = without_placeholders(tensor, shape[0], rows)
    if tensor.shape != shape:
        raise CheckpointError(
            f"{files[own]}: {own} has shape {tensor.shape}, {folder / CONFIG} describes {shape}; the two belong to "
            "different models"
        )
    return tensor


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _prepared(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """How the folder's data was prepared, as far as it says so; its chat template is known if an export wrote it."""
    said = config.get("data")
    found = dict(said) if isinstance(said, Mapping) else {}
    file = folder / CHAT_TEMPLATE
    if "template" not in found and file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        same = next((known for known in Template if chat_template(known) == text), None)
        return found if same is None else {**found, "template": str(same)}
    return found


def _described(
    config: Mapping[str, Any], said: Mapping[str, Any], images: Mapping[str, Any], folder: Path
) -> tuple[ModelConfig, DataConfig]:
    """The sections `model` and `data` of a recipe for this config."""
    kind = str(config.get("model_type"))
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{folder / CONFIG}: text_config: found {text!r}, expected an object")
    section: dict[str, Any] = {
        "language": dict(_language(config, text, kind, folder)),
        **_variant(config, kind, folder),
    }
    chosen = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    section["vision"] = {**_vision(config, folder), **_colours(images), "select_layer": chosen}
    problems: list[Problem] = []
    data = {name: value for name, value in said.items() if name in OF_DATA}
    recipe = build_recipe({"model": section, "data": data}, problems)
    problems += [problem for problem in out_of_range(recipe) if problem.concerns("model")]
    problems += rope_problems(recipe.model.language.rope_scaling)
    if problems:
        told = "; ".join(f"{', '.join(problem.paths)}: {problem.text}" for problem in problems)
        raise CheckpointError(f"{folder / CONFIG}: describes a model that a recipe cannot: {told}")
    return recipe.model, recipe.data


def _variant(config: Mapping[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """The variant and its stacks."""
    if kind == DEEPSTACK or kind in set(Variant):
        return {"variant": config.get("variant", kind), "stacks": config.get("stacks") or {}}
    if kind in ("llava", "llava_next"):
        return {"variant": str(published_variant(has_stacks=False, is_any_resolution=kind == "llava_next"))}
    if kind not in RELEASES:
        known = ", ".join(dict.fromkeys((DEEPSTACK, *Variant, "llava", "llava_next", *RELEASES)))
        raise CheckpointError(
            f"{folder / CONFIG}: model_type {kind!r} is no whole model of ours; known are {known}. Name its parts in "
            "train.init_from of a recipe"
        )
    stacks = {
        "start": config.get("deepstack_start_id", 1),
        "interval": config.get("deepstack_interval", 1),
        "num_crops": config.get("num_crops", 4),
        "sampler": config.get("deepstack_sampling", "2d"),
    }
    any_resolution = bool(config.get("is_anyres_deepstack"))
    stacked = any_resolution or config.get("image_aspect_ratio") == "deepstack" or "deepstack_sampling" in config
    variant = str(published_variant(has_stacks=stacked, is_any_resolution=any_resolution))
    return {"variant": variant, **({"stacks": stacks} if stacked else {})}


def _language(config: Mapping[str, Any], text: Mapping[str, Any], kind: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """Fields of `model.language`."""
    own = config.get("decoder") or {}
    spoken = RELEASES.get(kind, kind) if text is config else str(text.get("model_type", "llama"))
    family = next(
        (
            (name, traits)
            for name, traits in FAMILIES.items()
            if (name == own.get("family") if own.get("family") else _speaks(traits.hugging_face, spoken))
        ),
        None,
    )
    if family is None and not own:
        raise CheckpointError(f"{folder / CONFIG}: model_type {spoken!r} is no decoder of ours: {', '.join(FAMILIES)}")
    name, traits = family if family is not None else ("llama", FAMILIES["llama"])
    known = traits.hugging_face or FAMILIES["llama"].hugging_face
    assert known is not None
    for key, field in known.fields.items():
        if field.reads is not None and field.reads != "activation":
            value = text.get(key)
            yield field.reads, field.default if value is None else value
    yield "vocab_size", text_rows(config) or text.get("vocab_size")
    yield "rope_theta", rotary_base(text, known)
    yield "rope_scaling", rope_scaling(text)
    switches = own if own else traits.switches
    yield from ((switch, switches[switch]) for switch in ("qkv_bias", "qk_norm") if switch in switches)
    yield "family", own.get("family") if own else (None if traits.is_recognised else name)


def _speaks(known: Any, model_type: str) -> bool:
    return known is not None and model_type in known.model_types


def _vision(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of `model.vision`."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        named = str(config.get("mm_vision_tower", ""))
        if "clip-vit-large-patch14-336" in named:
            return {"architecture": "clip_vit_l14_336"} if "clip_vit_l14_336" in VISION else {}
        raise CheckpointError(
            f"{folder / CONFIG}: says nothing of the vision tower (mm_vision_tower {named!r}); add a vision_config, or "
            "name the folder with its tower in train.init_from"
        )
    kind = str(vision.get("model_type", "clip_vision_model"))
    if kind == "deepstack_vision":
        flags = ("has_class_token", "has_patch_bias", "has_pre_norm", "has_post_norm")
        same = [name for name, tower in TOWERS.items() if all(getattr(tower, flag) == vision[flag] for flag in flags)]
    else:
        same = [name for name, tower in TOWERS.items() if _speaks(tower.hugging_face, kind)]
    if not same:
        raise CheckpointError(f"{folder / CONFIG}: vision_config is no tower of ours: {', '.join(TOWERS)}")
    known = TOWERS[same[0]].hugging_face or TOWERS["clip"].hugging_face
    assert known is not None
    found: dict[str, Any] = {"kind": same[0]}
    for key, field in known.fields.items():
        if field.reads is not None:
            value = vision.get(key)
            found[field.reads] = field.default if value is None else value
    activations = {theirs: str(ours) for ours, theirs in ACTIVATIONS.items()}
    return {**found, "activation": activations.get(found["activation"], found["activation"])}


def _colours(images: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: images[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in images}
