"""Writing the folder of a whole multimodal model that transformers has itself, such as Qwen3-VL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.chat_template import chat_template
from megatron_deepstack.convert.export_files import (
    CARD,
    CHAT_TEMPLATE,
    GENERATION,
    About,
    generation_config,
    model_card,
    prepared_facts,
)
from megatron_deepstack.convert.hf_facts import CONFIG
from megatron_deepstack.convert.hf_names import Naming, to_naming
from megatron_deepstack.convert.hf_whole import WholeModel, whole_model_of
from megatron_deepstack.convert.hf_whole_written import whole_config
from megatron_deepstack.convert.hf_written import hf_tower
from megatron_deepstack.convert.stacked_experts import stacked_experts
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.convert.tokenizer_json import transformers_files
from megatron_deepstack.convert.vocabulary import EMBEDDINGS, lengthened, padded_vocabulary
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.model.weights import VISION_PREFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeFolder:
    """What a folder of such a model holds."""

    tensors: Mapping[str, LazyTensor]
    """By their names there."""
    files: Mapping[str, bytes]
    """All other files by name."""


def whole_folder(
    tensors: Mapping[str, LazyTensor], model: ModelConfig, tokenizer: Tokenizer | None, about: About
) -> WholeFolder:
    """Return what a folder of such a model holds, with which transformers loads model and processor.

    Args:
        tensors: All tensors of the model by their published names.
        model: The recipe's model, of a variant with `whole_model`.
        tokenizer: The run's tokenizer. Special tokens of the model that it lacks are added behind its others, and rows
            of the embedding for them if there are none. Without one the folder has no files for text.
        about: How images and conversations were prepared, and what the model card says.

    Returns:
        The tensors and the files.

    Raises:
        DataError: transformers cannot have the tokenizer.
    """
    found = whole_model_of(model.variant)
    assert found is not None, f"{model.variant} is no whole model of transformers"
    _, whole = found
    files, ids = _text_files(whole, tokenizer, about)
    found_tensors = dict(tensors)
    num_rows = padded_vocabulary(model.language.vocab_size, max(ids.values(), default=0))
    for name in EMBEDDINGS:
        if name in tensors:
            shape = (num_rows, *tensors[name].shape[1:])
            found_tensors[name] = tensors[name].changed(shape, lambda rows: lengthened(rows, num_rows))
    dtype = next(iter(tensors.values())).dtype
    if hf_tower(model.vision).final_norm and not tower_of(model.vision).has_post_norm:
        for kind, value in (("weight", 1.0), ("bias", 0.0)):
            norm = torch.full((model.vision.hidden_size,), value, dtype=dtype)
            found_tensors[f"{VISION_PREFIX}post_layernorm.{kind}"] = LazyTensor.of(norm)
    config = whole_config(replace(model, language=replace(model.language, vocab_size=num_rows)), ids)
    if about.seq_length is not None:
        config["text_config"]["max_position_embeddings"] = about.seq_length
    config["data"] = prepared_facts(about.data, tokenizer)
    config["dtype"] = str(dtype).removeprefix("torch.")
    stacked = stacked_experts(found_tensors)
    values = {CONFIG: config, **whole.processor(model, about.data)}
    return WholeFolder(
        tensors={to_naming(name, Naming.HUGGING_FACE, model): tensor for name, tensor in stacked.items()},
        files={
            **{name: _json(value) for name, value in values.items()},
            **files,
            CARD: model_card(model, about, remote_code=False).encode(),
        },
    )


def _text_files(
    whole: WholeModel, tokenizer: Tokenizer | None, about: About
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Files of tokenizer, template and generation, and the ids of special tokens by their keys in config.json."""
    if tokenizer is None:
        return {}, {}
    names = whole.special_tokens
    files, numbers = transformers_files(tokenizer, tuple(names.values()), image_token=whole.image_token)
    template = chat_template(about.data.template, image_token=whole.image_token, video_token=whole.video_token)
    files |= {GENERATION: _json(generation_config(tokenizer, about.data)), CHAT_TEMPLATE: template.encode()}
    return files, {key: numbers[name] for key, name in names.items()}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
