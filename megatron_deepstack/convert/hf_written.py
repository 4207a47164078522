"""The config.json of an export.

Keys and their order come from the entries of `config.traits`, so what is written here is what `hf_config` reads. A
decoder is written as the family whose mathematics the recipe asks for: Qwen3 with norms on queries and keys, Qwen2
with biases on them, else LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megatron_deepstack.config.build import plain
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.config.traits.families import HfDecoder, family_of, llama_fields
from megatron_deepstack.config.traits.hf_fields import HfField
from megatron_deepstack.config.traits.towers import HfTower, tower_of
from megatron_deepstack.convert.hf_facts import language_facts, vision_facts
from megatron_deepstack.convert.hf_rope import written_rope
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import decoder_slots

DEEPSTACK: Final = "deepstack"
"""`model_type` of exports that bring the code in `convert.hf_folder`."""


def hf_decoder(language: LanguageConfig) -> HfDecoder:
    """How Hugging Face knows the recipe's decoder.

    Raises:
        ConfigError: No decoder of transformers computes this one.
    """
    known = family_of(language).hugging_face
    if known is None:
        asked = f"family {language.family}" if language.family else "both qk_norm and qkv_bias"
        raise ConfigError([f"model.language: transformers has no decoder with {asked}; export with published names"])
    return known


def hf_tower(vision: VisionConfig) -> HfTower:
    """How Hugging Face knows the recipe's tower.

    Raises:
        ConfigError: transformers has no such tower.
    """
    known = tower_of(vision).hugging_face
    if known is None:
        raise ConfigError([f"model.vision.kind: transformers has no tower {vision.kind}; export with published names"])
    return known


def text_config(language: LanguageConfig, vocab_size: int) -> dict[str, Any]:
    """A decoder's config, without its `model_type`.

    Args:
        language: The recipe's decoder.
        vocab_size: Rows of the embedding that is written; it may be larger than the recipe's.
    """
    known = family_of(language).hugging_face
    fields = llama_fields() if known is None else known.fields
    return {
        **written_fields(fields, {**language_facts(language), "vocab_size": vocab_size}),
        **written_rope(language),
    }


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    """A tower's config.

    Raises:
        ConfigError: transformers has no such tower.
    """
    known = hf_tower(vision)
    return {"model_type": known.model_types[0], **written_fields(known.fields, vision_facts(vision))}


def written_fields(fields: Mapping[str, HfField], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the keys that an entry of the tables describes.

    Args:
        fields: The keys of one part of a config.
        facts: Values by the names that `HfField.reads` uses.

    Returns:
        The keys that are written, in the order of the row.
    """
    found = {}
    for key, field in fields.items():
        if field.reads is not None and field.written:
            found[key] = facts[field.reads]
        elif field.fixed and field.written:
            found[key] = field.fixed[0]
    return found


def select_strategy(vision: VisionConfig) -> str:
    """LLaVA's word for the tokens that it takes from the selected state: `default` drops the first one."""
    return "default" if tower_of(vision).has_class_token else "full"


def llava_config(model: ModelConfig, vocab_size: int, image_token: int, num_image_tokens: int) -> dict[str, Any]:
    """Config of `LlavaForConditionalGeneration`.

    Args:
        model: The recipe's model.
        vocab_size: Rows of the embedding that is written.
        image_token: Id of the image's placeholder.
        num_image_tokens: Rows that an image has in the sequence.

    Raises:
        ConfigError: transformers has no such decoder or tower.
    """
    decoder = hf_decoder(model.language)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": num_image_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": model.vision.select_layer,
        "vision_feature_select_strategy": select_strategy(model.vision),
        "tie_word_embeddings": model.language.tied_embeddings,
        "text_config": {"model_type": decoder.model_types[0], **text_config(model.language, vocab_size)},
        "vision_config": vision_config(model.vision),
    }


def deepstack_config(model: ModelConfig, vocab_size: int, image_token: int) -> dict[str, Any]:
    """Config of `DeepStackForConditionalGeneration`, the code in `convert.hf_folder`, for all variants.

    Args:
        model: The recipe's model.
        vocab_size: Rows of the embedding that is written.
        image_token: Id of the image's placeholder.

    Raises:
        ConfigError: transformers has no such decoder.
    """
    decoder, vision, traits = hf_decoder(model.language), model.vision, model.variant.traits
    return {
        "architectures": ["DeepStackForConditionalGeneration"],
        "model_type": DEEPSTACK,
        "auto_map": {
            "AutoConfig": "configuration_deepstack.DeepStackConfig",
            "AutoModel": "modeling_deepstack.DeepStackModel",
            "AutoModelForImageTextToText": "modeling_deepstack.DeepStackForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_deepstack.DeepStackForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_deepstack.DeepStackForConditionalGeneration",
        },
        "variant": str(model.variant),
        "context": str(traits.context),
        "stack_source": str(traits.stack_source),
        "stacked_part": str(traits.stacked_part),
        "sampler": str(model.stacks.sampler),
        "stacks": plain(model.stacks),
        "slots": list(plan_vit_stacks(model).slots if traits.stacks_in_vit else decoder_slots(model)),
        "vision_feature_layer": vision.select_layer,
        "projector_hidden_act": "gelu",
        "image_token_index": image_token,
        "num_text_tokens": model.language.vocab_size,
        "tie_word_embeddings": model.language.tied_embeddings,
        "text_config": {"model_type": decoder.model_types[0], **text_config(model.language, vocab_size)},
        "vision_config": deepstack_vision_config(vision),
    }


def deepstack_vision_config(vision: VisionConfig) -> dict[str, Any]:
    """Config of the tower in `convert.hf_folder`, which is one code for towers of all kinds."""
    tower = tower_of(vision)
    return {
        "model_type": "deepstack_vision",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "hidden_act": vision_facts(vision)["activation"],
        "layer_norm_eps": vision.layernorm_epsilon,
        "has_class_token": tower.has_class_token,
        "has_patch_bias": tower.has_patch_bias,
        "has_pre_norm": tower.has_pre_norm,
        "has_post_norm": tower.has_post_norm,
    }


def published_config(model: ModelConfig) -> dict[str, Any]:
    """The config that is written beside published names.

    Its `model_type` is none of transformers': a model type that transformers knows would make it load the decoder and
    drop the vision tower.
    """
    language, tower = model.language, tower_of(model.vision)
    return {
        "model_type": str(model.variant),
        "decoder": {"family": language.family, "qkv_bias": language.qkv_bias, "qk_norm": language.qk_norm},
        **text_config(language, language.vocab_size),
        **({} if tower.hugging_face is None else {"vision_config": vision_config(model.vision)}),
        "mm_vision_select_layer": model.vision.select_layer,
        "stacks": plain(model.stacks),
    }
