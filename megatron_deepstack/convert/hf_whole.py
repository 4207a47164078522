"""Whole multimodal models of transformers whose stacks we compute: their configs and names, in both directions.

A family is one entry of `WHOLE_MODELS`: its `model_type`, the keys of its config.json beside those of tower and decoder
(whose rows in `config.traits` say what their keys mean), and the prefixes of its tensors. `hf_folder_model` reads a
model with them from config.json alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from megatron_deepstack.config.build import build_recipe
from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.native_rules import native_problems
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.traits.families import FAMILIES, HfDecoder
from megatron_deepstack.config.traits.hf_fields import IGNORED, HfField, read
from megatron_deepstack.config.traits.towers import TOWERS, HfTower
from megatron_deepstack.convert.hf_facts import ACTIVATIONS
from megatron_deepstack.convert.hf_rope import axial_base, rotary_base, rotary_sections
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.weights import PROJECTOR_PREFIX, VISION_PREFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeModel:
    """How transformers stores a multimodal model."""

    architecture: str
    """Name of its class, which exports write."""
    tower: str
    """Name of its tower in `config.traits.towers`."""
    family: str
    """Name of its decoder in `config.traits.families`."""
    fields: Mapping[str, HfField]
    """Keys of its config beside `text_config` and `vision_config`."""
    prefixes: Mapping[str, str]
    """Prefix of a tensor in its files to the prefix of the published name; the longest one that fits decides."""
    stacks: Callable[[Mapping[str, Any], ModelConfig], dict[str, Any]] = field(default=lambda config, model: {})
    """From its config to the section `model.stacks` of a recipe."""
    facts: Callable[[ModelConfig], dict[str, Any]] = field(default=lambda model: {})
    """Values that `fields` read and that are neither the tower's nor the decoder's."""


QWEN3_VL: Final = WholeModel(
    architecture="Qwen3VLForConditionalGeneration",
    tower="qwen3_vl",
    family="qwen3_vl",
    fields={
        "tie_word_embeddings": read("tied_embeddings", default=False),
        **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), IGNORED),
    },
    prefixes={
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.visual.": VISION_PREFIX,
        "model.visual.merger.": f"{PROJECTOR_PREFIX}merger.",
        "model.visual.deepstack_merger_list.": f"{PROJECTOR_PREFIX}deepstack_merger_list.",
    },
)
WHOLE_MODELS: Final[Mapping[str, WholeModel]] = {"qwen3_vl": QWEN3_VL}
"""The models by their `model_type`."""


def whole_model_of(variant: Variant) -> tuple[str, WholeModel] | None:
    """Return the `model_type` and the model that computes a variant; None if transformers has none here."""
    name = variant.traits.whole_model
    return None if name is None else (name, WHOLE_MODELS[name])


def variant_of_whole(model_type: str) -> Variant:
    """Return the variant that a model of transformers computes, by its `model_type`."""
    return next(variant for variant in Variant if variant.traits.whole_model == model_type)


def model_of_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the model that a config.json describes.

    Args:
        config: Content of the file.
        where: The file, for messages.

    Returns:
        The model. `hf_config.require_same_model` must still say whether the config holds anything else.

    Raises:
        CheckpointError: The `model_type` is not known here, or a value has the wrong type.
    """
    whole = WHOLE_MODELS.get(str(config.get("model_type")))
    if whole is None:
        raise CheckpointError(
            f"{where}: model_type: found {config.get('model_type')!r}, expected one of {', '.join(WHOLE_MODELS)}"
        )
    text, vision = (_section(config, key, where) for key in ("text_config", "vision_config"))
    decoder, tower = FAMILIES[whole.family].hugging_face, TOWERS[whole.tower].hugging_face
    assert decoder is not None
    assert tower is not None
    plain: dict[str, Any] = {
        "variant": str(variant_of_whole(str(config["model_type"]))),
        "language": {"family": whole.family, **FAMILIES[whole.family].switches, **_language(text, decoder)},
        "vision": {"kind": whole.tower, **_vision(vision, tower), **dict(_fixed(whole.tower))},
    }
    for key, value in whole.fields.items():
        if value.reads is not None:
            plain["language"][value.reads] = _value(config, key, value)
    model = _built(plain, where)
    model = _built({**plain, "stacks": whole.stacks(config, model)}, where)
    _refuse(native_problems(model), where)
    return model


def _refuse(problems: Iterable[Problem], where: str) -> None:
    found = list(problems)
    if found:
        listed = "\n  ".join(f"{', '.join(problem.paths)}: {problem.text}" for problem in found)
        raise CheckpointError(f"{where}: describes no model that can be computed here:\n  {listed}")


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {key}: found {value!r}, expected an object")
    return value


def _built(plain: Mapping[str, Any], where: str) -> ModelConfig:
    problems: list[Problem] = []
    recipe = build_recipe({"model": plain}, problems)
    _refuse(problems, where)
    return recipe.model


def _language(text: Mapping[str, Any], decoder: HfDecoder) -> dict[str, Any]:
    found = dict(_read(text, decoder.fields))
    found.pop("activation", None)  # the family has one, and a config with another is refused
    found["rope_theta"] = rotary_base(text, decoder)
    section = rotary_sections(text)
    if section is not None:
        found["mrope_section"] = section
    return found


def _vision(vision: Mapping[str, Any], tower: HfTower) -> dict[str, Any]:
    found = dict(_read(vision, tower.fields))
    found.pop("out_hidden_size", None)
    names = {theirs: str(ours) for ours, theirs in ACTIVATIONS.items()}
    found["activation"] = names.get(found["activation"], found["activation"])
    found["rope_theta"] = axial_base(vision)
    return found


def _fixed(tower: str) -> Iterator[tuple[str, Any]]:
    """Fields of a tower that its config does not name."""
    epsilon = TOWERS[tower].layernorm_epsilon
    if epsilon is not None:
        yield "layernorm_epsilon", epsilon
    if TOWERS[tower].is_native:
        yield "select_layer", -1
        yield "mean", [0.5, 0.5, 0.5]
        yield "std", [0.5, 0.5, 0.5]


def _read(theirs: Mapping[str, Any], fields: Mapping[str, HfField]) -> Iterator[tuple[str, Any]]:
    for key, known in fields.items():
        if known.reads is not None:
            yield known.reads, _value(theirs, key, known)


def _value(theirs: Mapping[str, Any], key: str, known: HfField) -> Any:
    value = theirs.get(key)
    return known.default if value is None else value
