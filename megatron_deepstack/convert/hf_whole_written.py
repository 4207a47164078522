"""The config.json of a whole multimodal model of transformers, from the entries with which `hf_whole` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.hf_facts import language_facts, vision_facts
from megatron_deepstack.convert.hf_rope import written_rope
from megatron_deepstack.convert.hf_whole import model_of_config, whole_model_of
from megatron_deepstack.convert.hf_written import hf_decoder, hf_tower, written_fields
from megatron_deepstack.errors import CheckpointError, ConfigError
from megatron_deepstack.planning.slots import decoder_slots


def whole_config(model: ModelConfig, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """Config of the model of transformers that computes a variant as a whole.

    Args:
        model: The recipe's model, of a variant with `whole_model`.
        token_ids: Ids of its special tokens by their keys, such as `image_token_id`. Keys that are left out have the
            published values when transformers reads the config.

    Returns:
        The content of config.json, without dtype.
    """
    found = whole_model_of(model.variant)
    assert found is not None, f"{model.variant} is no whole model of transformers"
    model_type, whole = found
    language, vision = model.language, model.vision
    decoder, tower = hf_decoder(language), hf_tower(vision)
    facts = language_facts(language)
    return {
        "architectures": [whole.architecture],
        "model_type": model_type,
        **written_fields(whole.fields, facts),
        **whole.keys(model),
        **token_ids,
        "text_config": {
            "model_type": decoder.model_types[0],
            **written_fields(decoder.fields, facts),
            "tie_word_embeddings": language.tied_embeddings,
            **written_rope(language),
        },
        "vision_config": {
            "model_type": next(name for name, kind in whole.towers.items() if kind == vision.kind),
            **written_fields(tower.fields, {**vision_facts(vision), "out_hidden_size": language.hidden_size}),
            **(_axial(vision) if tower_of(vision).is_native else {}),
        },
    }


def require_whole(model: ModelConfig) -> None:
    """Refuse a model that trains here and that transformers' model of the same name cannot compute.

    Its config has no key for all that a recipe may choose, such as the slots of Qwen3-VL's stacks. So the config is
    read back, and what it says of stacks must be what the recipe says.

    Args:
        model: The recipe's model, of a variant with `whole_model`.

    Raises:
        ConfigError: It cannot; every field that differs is named.
    """
    found = whole_model_of(model.variant)
    assert found is not None, f"{model.variant} is no whole model of transformers"
    name, way_out = found[1].architecture, "`ask`, `generate` and `evaluate` take the run itself"
    try:
        theirs = _stacks(model_of_config(whole_config(model, {}), "its config.json"))
    except CheckpointError as error:
        raise ConfigError([f"model: {name} cannot be written: {error}; {way_out}"]) from error
    different = [
        f"{field}: found {ours}, and {name} computes {theirs[field]}, whatever its config.json says; {way_out}"
        for field, ours in _stacks(model).items()
        if theirs[field] != ours
    ]
    if different:
        raise ConfigError(different)


def _stacks(model: ModelConfig) -> dict[str, Any]:
    """What makes stacks, and where they enter, by fields of the recipe."""
    found: dict[str, Any] = {"model.stacks.slots": decoder_slots(model), "model.vision.taps": model.vision.taps}
    if not tower_of(model.vision).is_native:
        found["model.vision.tile_grids"] = model.vision.tile_grids
        found |= {f"model.qformer.{name}": value for name, value in asdict(model.qformer).items()}
    return found


def _axial(vision: VisionConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta}}
