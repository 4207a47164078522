"""Writing the folder of a whole multimodal model that transformers has itself, such as Qwen3-VL."""

from __future__ import annotations

from typing import Any, Final

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.hf_names import Naming, to_naming
from megatron_deepstack.convert.hf_whole_written import whole_config
from megatron_deepstack.convert.hf_written import hf_tower
from megatron_deepstack.convert.stacked_experts import stack_experts
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.model.weights import VISION_PREFIX

_SPECIAL_TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_index": "<image>",
}
"""Names of the tokens whose ids a config holds. Without a tokenizer, transformers takes the published ids."""


def whole_folder(
    tensors: dict[str, torch.Tensor], model: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what a folder of such a model holds.

    Args:
        tensors: All tensors of the model by their published names.
        model: The recipe's model, of a variant with `whole_model`.
        tokenizer: Says the ids of special tokens, if it is known.

    Returns:
        The tensors under the names of transformers, and the content of config.json.
    """
    ids = {} if tokenizer is None else {key: tokenizer.control_id(name) for key, name in _SPECIAL_TOKENS.items()}
    config = whole_config(model, {key: number for key, number in ids.items() if number is not None})
    if hf_tower(model.vision).final_norm and not tower_of(model.vision).has_post_norm:
        like = next(iter(tensors.values()))
        tensors[f"{VISION_PREFIX}post_layernorm.weight"] = like.new_ones(model.vision.hidden_size)
        tensors[f"{VISION_PREFIX}post_layernorm.bias"] = like.new_zeros(model.vision.hidden_size)
    together = stack_experts(tensors)
    return {to_naming(name, Naming.HUGGING_FACE, model): tensor for name, tensor in together.items()}, config
