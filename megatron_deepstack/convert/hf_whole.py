"""Whole multimodal models of transformers whose stacks we compute: their configs and names, in both directions.

A family is one entry of `WHOLE_MODELS`: its `model_type`, the keys of its config.json beside those of tower and decoder
(whose entries in `config.traits` say what their keys mean), and the prefixes of its tensors. `hf_folder_model` reads a
model with them from config.json alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from megatron_deepstack.config.build import build_recipe
from megatron_deepstack.config.check import find_problems, out_of_range
from megatron_deepstack.config.choices import Template, Variant
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.rope_scaling import rope_problems
from megatron_deepstack.config.schema import DataConfig, ModelConfig, Recipe
from megatron_deepstack.config.traits.families import FAMILIES, FamilyTraits, HfDecoder
from megatron_deepstack.config.traits.hf_fields import IGNORED, HfField, read
from megatron_deepstack.config.traits.towers import TOWERS, HfTower
from megatron_deepstack.convert.hf_facts import ACTIVATIONS, with_usual_keys
from megatron_deepstack.convert.hf_granite import granite_keys, granite_sections
from megatron_deepstack.convert.hf_processors import Values, granite_processor, qwen3_vl_processor
from megatron_deepstack.convert.hf_rope import axial_base, rope_scaling, rotary_base, rotary_sections
from megatron_deepstack.errors import CheckpointError, SlotError
from megatron_deepstack.model.weights import PROJECTOR_PREFIX, VISION_PREFIX
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.planning.slots import decoder_slots

T = TypeVar("T")
Sections = Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeModel:
    """How transformers stores a multimodal model."""

    architecture: str
    """Name of its class, which exports write."""
    towers: Mapping[str, str]
    """Name in `config.traits.towers` by the `model_type` of its `vision_config`; the first is taken if it has none."""
    family: str
    """Name of its decoder in `config.traits.families`."""
    fields: Mapping[str, HfField]
    """Keys of its config beside `text_config` and `vision_config`."""
    prefixes: Mapping[str, str]
    """Prefix of a tensor in its files to the prefix of the published name; the longest one that fits decides."""
    special_tokens: Mapping[str, str]
    """Names of the tokens whose ids its config holds, by the key."""
    image_token: str
    """The token that stands for an image in a text, which its processor repeats for each visual token."""
    video_token: str | None = None
    """The same for a video."""
    template: Template
    """The chat format that the published weights have learned."""
    processor: Callable[[ModelConfig, DataConfig], Values]
    """From a model and the preparation of its data to the files of its processor."""
    unused: tuple[str, ...] = ()
    """Prefixes of tensors that no row passes, which are neither read nor written."""
    sections: Sections = field(default=lambda config, vision, where: {})
    """From its config, the recipe's section `vision` and the file's name to further fields, by section."""
    keys: Callable[[ModelConfig], dict[str, Any]] = field(default=lambda model: {})
    """From a model to the keys that `sections` reads."""


QWEN3_VL: Final = WholeModel(
    architecture="Qwen3VLForConditionalGeneration",
    towers={"qwen3_vl_vision": "qwen3_vl", "qwen3_vl": "qwen3_vl"},
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
    special_tokens={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    image_token="<|image_pad|>",
    template=Template.QWEN3_VL,
    video_token="<|video_pad|>",
    processor=qwen3_vl_processor,
)
QWEN3_VL_MOE: Final = replace(
    QWEN3_VL,
    architecture="Qwen3VLMoeForConditionalGeneration",
    towers={"qwen3_vl_moe_vision": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl"},
    family="qwen3_vl_moe",
)
GRANITE4_VISION: Final = WholeModel(
    architecture="Granite4VisionForConditionalGeneration",
    towers={"clip_vision_model": "clip", "siglip_vision_model": "siglip"},
    family="granite",
    fields={
        "tie_word_embeddings": read("tied_embeddings", default=False),
        **dict.fromkeys(
            (
                "deepstack_layer_map",
                "downsample_rate",
                "image_grid_pinpoints",
                "image_seq_length",
                "image_token_id",
                "image_token_index",
                "projector_dropout",
                "projector_hidden_act",
                "qformer_config",
                "spatial_target_layers",
                "spatial_vision_layer",
                "use_image_newline_parameter",
                "vision_feature_layer",
                "vision_feature_select_strategy",
            ),
            IGNORED,
        ),
    },
    prefixes={
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_tower.": VISION_PREFIX,
        "model.image_newline": "model.image_newline",
        "model.layerwise_projectors.": f"{PROJECTOR_PREFIX}layerwise_projectors.",
        "model.spatial_projectors.": f"{PROJECTOR_PREFIX}spatial_projectors.",
    },
    special_tokens={"image_token_index": IMAGE_TOKEN},
    image_token=IMAGE_TOKEN,
    template=Template.GRANITE_4,
    processor=granite_processor,
    unused=("model.vision_tower.post_layernorm.", "model.vision_tower.head."),
    sections=granite_sections,
    keys=granite_keys,
)
WHOLE_MODELS: Final[Mapping[str, WholeModel]] = {
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "granite4_vision": GRANITE4_VISION,
}
"""The models by their `model_type`."""


def whole_model_of(variant: Variant) -> tuple[str, WholeModel] | None:
    """Return the `model_type` and the model that computes a variant; None if transformers has none here."""
    name = variant.traits.whole_model
    return None if name is None else (name, WHOLE_MODELS[name])


def variant_of_whole(model_type: str) -> Variant:
    """Return the variant that a model of transformers computes, by its `model_type`."""
    return next(variant for variant in Variant if variant.traits.whole_model == model_type)


def used_tensors(tensors: Mapping[str, T], model: ModelConfig) -> dict[str, T]:
    """Leave out the tensors of a folder that no row passes, such as a tower's head for classification.

    Args:
        tensors: By their names in the folder.
        model: The folder's model.

    Returns:
        The others, in order.
    """
    found = whole_model_of(model.variant)
    unused = () if found is None else found[1].unused
    return {name: value for name, value in tensors.items() if not name.startswith(unused)}


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
    vision_type = str(vision.get("model_type") or next(iter(whole.towers)))
    if vision_type not in whole.towers:
        raise CheckpointError(
            f"{where}: vision_config.model_type: found {vision_type!r}, expected one of {', '.join(whole.towers)}"
        )
    kind = whole.towers[vision_type]
    family = FAMILIES[whole.family]
    decoder, tower = family.hugging_face, TOWERS[kind].hugging_face
    assert decoder is not None
    assert tower is not None
    plain: dict[str, Any] = {
        "variant": str(variant_of_whole(str(config["model_type"]))),
        "language": {
            "family": whole.family,
            **family.switches,
            **_language(text, decoder, family),
        },
        "vision": {"kind": kind, **_vision(vision, tower, kind), **dict(_fixed(kind))},
    }
    for key, value in whole.fields.items():
        if value.reads is not None:
            plain["language"][value.reads] = _value(config, key, value)
    _built(plain, where)
    for section, values in whole.sections(config, plain["vision"], where).items():
        plain[section] = {**plain.get(section, {}), **values}
    model = _built(plain, where)
    problems = find_problems(Recipe(model=model))
    _refuse([one for one in problems if all(path.startswith("model.") for path in one.paths)], where)
    try:
        decoder_slots(model)
    except SlotError as error:
        raise CheckpointError(f"{where}: {'; '.join(error.problems)}") from error
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
    problems += [problem for problem in out_of_range(recipe) if problem.concerns("model")]
    _refuse([*problems, *rope_problems(recipe.model.language.rope_scaling)], where)
    return recipe.model


def _language(text: Mapping[str, Any], decoder: HfDecoder, family: FamilyTraits) -> dict[str, Any]:
    found = dict(_read(with_usual_keys(text, decoder), decoder.fields))
    found.pop("activation", None)  # the family has one, and a config with another is refused
    width, heads = found["hidden_size"], found["num_heads"]
    if isinstance(width, int) and isinstance(heads, int) and heads:
        found["num_kv_heads"] = heads if found["num_kv_heads"] is None else found["num_kv_heads"]
        found["head_dim"] = width // heads if found["head_dim"] is None else found["head_dim"]
    found["rope_theta"] = rotary_base(text, decoder)
    found["rope_scaling"] = rope_scaling(text)
    if family.has_axial_positions:
        found["mrope_section"] = rotary_sections(text)
    return found


def _vision(vision: Mapping[str, Any], tower: HfTower, kind: str) -> dict[str, Any]:
    found = dict(_read(vision, tower.fields))
    found.pop("out_hidden_size", None)
    names = {theirs: str(ours) for ours, theirs in ACTIVATIONS.items()}
    found["activation"] = names.get(found["activation"], found["activation"])
    if TOWERS[kind].is_native:
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
