"""The config.json of a whole multimodal model of transformers, from the entries with which `hf_whole` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.hf_facts import language_facts, vision_facts
from megatron_deepstack.convert.hf_rope import written_rope
from megatron_deepstack.convert.hf_whole import whole_model_of
from megatron_deepstack.convert.hf_written import hf_decoder, hf_tower, written_fields


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


def _axial(vision: VisionConfig) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta}}
