"""Whether a checkpoint's config.json describes the model that the recipe computes.

The shapes of tensors do not show the number of heads, epsilons, the rotary base, windows, multipliers or the
activation; a checkpoint that is loaded with another value runs, and computes something else. So a config is accepted
only where its `model_type` is known and every key is understood (`config.traits.hf_fields`). Whatever differs or is not
understood is refused, and the message names it.

A config speaks of a decoder, of a vision tower, or of both: LLaVA's hold `text_config` and `vision_config`, the
DeepStack and LLaVA releases have the decoder's keys beside some of their own, and CLIP's and SigLIP's hold a tower,
and a text encoder that no model of ours uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import used_layers
from megatron_deepstack.config.traits.families import FAMILIES, HfDecoder, family_of, llama_fields
from megatron_deepstack.config.traits.hf_fields import IGNORED, NO_INFLUENCE, REQUIRED_VALUES, HfField, fixed
from megatron_deepstack.config.traits.towers import TOWERS, tower_of
from megatron_deepstack.config.traits.variants import Variant
from megatron_deepstack.convert.hf_facts import CONFIG, language_facts, vision_facts, with_usual_keys
from megatron_deepstack.convert.hf_rope import (
    ROPE_KEYS,
    WINDOW_KEYS,
    axial_differences,
    rope_differences,
    window_differences,
)
from megatron_deepstack.convert.hf_whole import WHOLE_MODELS, variant_of_whole
from megatron_deepstack.convert.hf_written import (
    DEEPSTACK,
    deepstack_vision_config,
    hf_decoder,
    hf_tower,
    select_strategy,
)
from megatron_deepstack.errors import CheckpointError

_LLAVA: Mapping[str, HfField] = {
    "projector_hidden_act": fixed("gelu"),
    "multimodal_projector_bias": fixed(True),
    **dict.fromkeys(
        (
            "data",
            "ignore_index",
            "image_grid_pinpoints",
            "image_seq_length",
            "image_token_id",
            "image_token_index",
            "text_config",
            "tie_word_embeddings",
            "use_image_newline_parameter",
            "vision_config",
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "vocab_size",
        ),
        IGNORED,
    ),
}
"""Keys of `LlavaConfig` and `LlavaNextConfig` beside the two models' own; features are compared apart."""
_PUBLISHED: Mapping[str, HfField] = {
    "mm_projector_type": fixed("mlp2x_gelu"),
    "mm_resampler_type": fixed(None),
    "mm_use_im_start_end": fixed(False),
    "mm_vision_select_feature": HfField(fixed=("patch", "cls_patch"), default="patch"),
    **dict.fromkeys(
        (
            "data",
            "decoder",
            "deepstack_interval",
            "deepstack_sampling",
            "deepstack_start_id",
            "freeze_backbone",
            "freeze_mm_mlp_adapter",
            "freeze_mm_vision_resampler",
            "image_aspect_ratio",
            "image_crop_resolution",
            "image_grid_pinpoints",
            "image_split_resolution",
            "is_anyres_deepstack",
            "mm_hidden_size",
            "mm_patch_merge_type",
            "mm_projector_lr",
            "mm_tunable_parts",
            "mm_use_im_patch_token",
            "mm_vision_select_layer",
            "mm_vision_tower",
            "mm_vision_tower_lr",
            "num_crops",
            "stacks",
            "tune_mm_mlp_adapter",
            "tune_mm_vision_resampler",
            "unfreeze_mm_vision_tower",
            "use_mm_proj",
            "vision_config",
            "vision_tower_pretrained",
        ),
        IGNORED,
    ),
}
"""Keys that the DeepStack and LLaVA releases, and our exports, have beside their decoder's."""
_TOWER_PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Configs that hold a tower and a text encoder, and what their `vision_config` is if it does not say."""
_PAIR: Mapping[str, HfField] = dict.fromkeys(
    (
        "logit_scale_init_value",
        "projection_dim",
        "text_config",
        "text_config_dict",
        "vision_config",
        "vision_config_dict",
    ),
    IGNORED,
)
RELEASES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""`model_type` of releases that have a decoder's keys at the top, and that decoder's."""


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Args:
        path: The checkpoint's folder, or a file with config.json beside it.

    Returns:
        Its content; empty where there is none.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def require_same_model(
    config: Mapping[str, Any], model: ModelConfig, where: str, seq_length: int | None = None
) -> None:
    """Refuse a config that describes other mathematics than the recipe's.

    Args:
        config: Content of a config.json; empty where a checkpoint has none, and then nothing is asked.
        model: The recipe's model.
        where: The checkpoint, for the message.
        seq_length: `train.seq_length`, up to which an attention window makes no difference; without it none may be.

    Raises:
        CheckpointError: With every key that differs, or that is not understood.
    """
    found = list(_differences(config, model, seq_length)) if config else []
    if found:
        listed = "\n  ".join(found)
        raise CheckpointError(f"{where}: its {CONFIG} describes another model than the recipe:\n  {listed}")


def _differences(config: Mapping[str, Any], model: ModelConfig, seq_length: int | None) -> Iterator[str]:
    model_type = str(config.get("model_type"))
    text, vision = config.get("text_config"), config.get("vision_config")
    if model_type in ("llava", "llava_next") and isinstance(text, Mapping):
        yield from _unequal("", config, _LLAVA, {})
        yield from _feature({"vision_feature_layer": -2, **config}, "vision_feature_layer", model)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != select_strategy(model.vision):
            yield f"vision_feature_select_strategy: {strategy!r}, computed is {select_strategy(model.vision)!r}"
        yield from _decoder({"model_type": "llama", **text}, {}, model, seq_length)
        yield from _tower({"model_type": "clip_vision_model", **_section(vision)}, model)
    elif model_type == DEEPSTACK and isinstance(text, Mapping) and isinstance(vision, Mapping):
        yield from _feature({"vision_feature_layer": -2, **config}, "vision_feature_layer", model)
        yield from _decoder({"model_type": "llama", **text}, {}, model, seq_length)
        ours = deepstack_vision_config(model.vision)
        yield from (
            _other("model.vision", key, vision.get(key), value)
            for key, value in ours.items()
            if vision.get(key) != value
        )
    elif model_type in WHOLE_MODELS:
        yield from _whole(config, model_type, model, seq_length)
    elif model_type in _TOWER_PAIRS:
        yield from _unequal("", config, _PAIR, {})
        yield from _tower({"model_type": _TOWER_PAIRS[model_type], **_section(vision)}, model)
    elif model_type in RELEASES or model_type in set(Variant):
        yield from _feature(config, "mm_vision_select_layer", model)
        if model_type in RELEASES and "decoder" not in config:  # which an export of ours has
            yield from _decoder({**config, "model_type": RELEASES[model_type]}, _PUBLISHED, model, seq_length)
        else:
            yield from _own_decoder(config, model, seq_length)
        if isinstance(vision, Mapping):
            yield from _tower({"model_type": "clip_vision_model", **vision}, model)
    elif any(model_type in known.model_types for _, known in _decoders()):
        yield from _decoder(config, {}, model, seq_length)
    elif any(model_type in known.hugging_face.model_types for known in TOWERS.values() if known.hugging_face):
        yield from _tower(config, model)
    else:
        yield _unknown_type("model_type", config.get("model_type"))


def _whole(config: Mapping[str, Any], model_type: str, model: ModelConfig, seq_length: int | None) -> Iterator[str]:
    """What the config of a whole model says otherwise than the recipe."""
    whole = WHOLE_MODELS[model_type]
    if model.variant.traits.whole_model != model_type:
        yield _other("model", "variant", str(variant_of_whole(model_type)), str(model.variant))
        return
    fields = {**whole.fields, **dict.fromkeys(("data", "text_config", "vision_config"), IGNORED)}
    yield from _unequal("model.language", config, fields, language_facts(model.language))
    text_type, vision_type = (known.model_types[0] for known in (hf_decoder(model.language), hf_tower(model.vision)))
    for section, values in whole.sections(
        config, {**vision_facts(model.vision), "kind": model.vision.kind}, CONFIG
    ).items():
        for name, value in values.items():
            if name == "select_layer":
                continue  # layers behind the last tap change nothing
            ours = getattr(getattr(model, section), name)
            if (list(ours) if isinstance(ours, tuple) else ours) != value:
                yield _other(f"model.{section}", name, value, ours)
    yield from _decoder({"model_type": text_type, **_section(config.get("text_config"))}, {}, model, seq_length)
    yield from _tower({"model_type": vision_type, **_section(config.get("vision_config"))}, model)


def _section(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _decoders() -> list[tuple[str, HfDecoder]]:
    return [(name, family.hugging_face) for name, family in FAMILIES.items() if family.hugging_face is not None]


def _own_decoder(config: Mapping[str, Any], model: ModelConfig, seq_length: int | None) -> Iterator[str]:
    """An export of ours says the switches itself; of earlier releases they show in the tensors' names."""
    language = model.language
    facts = {"family": language.family, "qkv_bias": language.qkv_bias, "qk_norm": language.qk_norm}
    for key, value in _section(config.get("decoder")).items():
        if key not in facts or value != facts[key]:
            yield _other("model.language", key, value, facts.get(key))
    known = family_of(language).hugging_face or HfDecoder(model_types=(), fields=llama_fields())
    yield from _numbers(config, known, _PUBLISHED, model, seq_length)


def _unknown_type(key: str, value: Any) -> str:
    decoders = dict.fromkeys(name for _, known in _decoders() for name in known.model_types)
    towers = dict.fromkeys(
        name for known in TOWERS.values() if known.hugging_face for name in known.hugging_face.model_types
    )
    return (
        f"{key}: found {value!r}, and what such a model computes is not known here; known are the decoders "
        f"{', '.join(decoders)}, the towers {', '.join(towers)} ({', '.join(_TOWER_PAIRS)}), "
        f"llava, llava_next and {', '.join(WHOLE_MODELS)}"
    )


def _feature(config: Mapping[str, Any], key: str, model: ModelConfig) -> Iterator[str]:
    """The state of the tower that the projector was trained on."""
    vision, theirs = model.vision, config.get(key)
    if theirs is None:
        return
    layers = _section(config.get("vision_config")).get("num_hidden_layers", vision.num_layers)
    if not isinstance(theirs, int) or (theirs if theirs >= 0 else layers + 1 + theirs) != used_layers(vision):
        yield f"model.vision.select_layer: {theirs!r} in the checkpoint ({key}), {vision.select_layer} in the recipe"


def _decoder(
    text: Mapping[str, Any], more: Mapping[str, HfField], model: ModelConfig, seq_length: int | None
) -> Iterator[str]:
    """What a decoder's config says otherwise than the recipe; `more` are keys that may stand among its own."""
    language, own = model.language, family_of(model.language)
    model_type = str(text.get("model_type"))
    speakers = [family for family in FAMILIES.values() if _speaks(family.hugging_face, model_type)]
    if not speakers:
        yield _unknown_type("text_config.model_type", text.get("model_type"))
        return
    family = own if own in speakers else speakers[0]
    known = family.hugging_face
    assert known is not None
    facts = language_facts(language)
    for switch, value in family.switches.items():
        if facts[switch] is not value:
            yield _other("model.language", switch, value, facts[switch])
    if family.has_linear_biases is not own.has_linear_biases:
        yield _other("model.language", "family", f"{model_type} (biases: {family.has_linear_biases})", language.family)
    yield from _numbers(text, known, more, model, seq_length)


def _numbers(
    text: Mapping[str, Any],
    known: HfDecoder,
    more: Mapping[str, HfField],
    model: ModelConfig,
    seq_length: int | None,
) -> Iterator[str]:
    """The keys of a decoder's config, of a family that is settled."""
    language, text = model.language, with_usual_keys(text, known)
    heads = text.get("num_attention_heads") or known.fields["num_attention_heads"].default
    width = text.get("hidden_size") or language.hidden_size
    if isinstance(heads, int) and heads:
        text = {**text}
        _fill(text, "num_key_value_heads", known, heads)
        _fill(text, "head_dim", known, width // heads)
    fields, special = {**known.fields, **more}, ROPE_KEYS | WINDOW_KEYS
    yield from _unequal("model.language", text, fields, language_facts(language), special)
    yield from rope_differences(text, language, known)
    yield from window_differences(text, known, language.num_layers, seq_length)


def _fill(text: dict[str, Any], key: str, known: HfDecoder, derived: int) -> None:
    """Put the number that transformers derives for a key that is absent and has no default of its own."""
    field = known.fields.get(key)
    if field is not None and field.default is None and text.get(key) is None:
        text[key] = derived


def _speaks(known: HfDecoder | None, model_type: str) -> bool:
    return known is not None and model_type in known.model_types


def _tower(vision: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    """What a tower's config says otherwise than the recipe."""
    own = tower_of(model.vision)
    model_type = str(vision.get("model_type"))
    speakers = {
        kind: traits
        for kind, traits in TOWERS.items()
        if traits.hugging_face is not None and model_type in traits.hugging_face.model_types
    }
    if not speakers:
        yield _unknown_type("vision_config.model_type", vision.get("model_type"))
        return
    kind = model.vision.kind if own in speakers.values() else next(iter(speakers))
    if kind != model.vision.kind:
        yield _other("model.vision", "kind", kind, model.vision.kind)
    known = TOWERS[kind].hugging_face
    assert known is not None
    special = ROPE_KEYS if TOWERS[kind].is_native else frozenset()
    facts = {**vision_facts(model.vision), "out_hidden_size": model.language.hidden_size}
    yield from _unequal("model.vision", vision, known.fields, facts, special)
    if TOWERS[kind].is_native:
        yield from axial_differences(vision, model.vision.rope_theta)


def _unequal(
    section: str,
    theirs: Mapping[str, Any],
    fields: Mapping[str, HfField],
    facts: Mapping[str, Any],
    special: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """Keys that say another thing than we compute, and keys that are not understood."""
    for key, field in fields.items():
        if field.reads is not None and field.compared:
            value = theirs.get(key)
            value = field.default if value is None else value
            if value != facts[field.reads]:
                yield _other(section, field.reads, value, facts[field.reads])
    for key, value in theirs.items():
        known = fields.get(key, REQUIRED_VALUES.get(key))
        if known is None and value is not None and key not in NO_INFLUENCE and key not in special:
            yield (
                f"{key}: found {_short(value)}, a key that is not known here and may change what the weights compute; "
                f"remove it from {CONFIG} only if you know that it does not"
            )
        elif known is not None and known.fixed and value is not None and value not in known.fixed:
            yield f"{key}: found {_short(value)}, computed is {known.fixed[0]!r}"
    for key, field in fields.items():
        if field.fixed and theirs.get(key) is None and field.default not in field.fixed:
            yield f"{key}: absent, which transformers takes for {field.default!r}; computed is {field.fixed[0]!r}"


def _other(section: str, field: str, theirs: Any, ours: Any) -> str:
    return f"{section}.{field}: {theirs!r} in the checkpoint, {ours!r} in the recipe"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
