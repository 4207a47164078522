"""What the keys of a Hugging Face config.json mean here, as data that is used for reading and for writing.

A config describes mathematics. It is accepted only if each of its keys is known: a key is *read* (it must equal the
recipe's value), *fixed* (only the value that is computed here is accepted) or *without influence* on what the weights
compute. Any other key is refused by name, since it may change the result. The same data writes the config of an export.

`convert.hf_config` judges keys that only have a meaning together (the rotary embedding, attention windows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class HfField:
    """One key of a config.json."""

    default: Any = None
    """Value that transformers uses if the key is absent."""
    reads: str | None = None
    """Name of the recipe's field, or of a number derived from it, that the value must equal."""
    compared: bool = True
    """False for sizes that the shapes of the tensors show in any case; they are written and not compared."""
    fixed: tuple[Any, ...] = ()
    """The values with which transformers computes what is computed here; exports write the first one."""
    written: bool = True
    """Whether an export writes the key."""


def read(ours: str, default: Any = None) -> HfField:
    """Describe a key that must equal a field of the recipe.

    Args:
        ours: Name of the recipe's field, or of a number derived from it.
        default: Value that transformers uses if the key is absent.

    Returns:
        The description.
    """
    return HfField(reads=ours, default=default)


def shape(ours: str) -> HfField:
    """Describe a size that the shapes of the tensors show; it is written and not compared."""
    return HfField(reads=ours, compared=False)


def fixed(*values: Any, default: Any = None, written: bool = False) -> HfField:
    """Describe a key that must have one of a few values.

    Args:
        *values: The values with which transformers computes what is computed here; an export writes the first one.
        default: Value that transformers uses if the key is absent; None means the first of `values`.
        written: Whether an export writes the key.

    Returns:
        The description.
    """
    return HfField(fixed=values, default=values[0] if default is None else default, written=written)


IGNORED: Final = HfField(compared=False, written=False)
"""A key that has no influence in one kind of model, although it may have one in another kind."""

_THE_FILE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    dtype finetuning_task model_type name_or_path prefix problem_type task_specific_params tokenizer_class torch_dtype
    transformers_version unsloth_fixed unsloth_version
"""
"""Keys about the file itself and about the program that wrote it."""
_RUNNING = """
    chunk_size_feed_forward gradient_checkpointing is_decoder output_attentions output_hidden_states output_scores
    return_dict return_dict_in_generate tf_legacy_loss torchscript use_bfloat16 use_cache use_return_dict
"""
"""Keys about how transformers runs a model, which do not change what it computes."""
_ANSWERS = """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences pad_token_id remove_invalid_values repetition_penalty sep_token_id suppress_tokens temperature
    tokenizer_model_max_length tokenizer_padding_side top_k top_p typical_p
"""
"""Keys about generating answers, and special tokens."""
_OTHER_HEADS = "id2label label2id num_labels"
"""Keys about heads for classification, whose tensors are not part of the model."""
_START = "initializer_factor initializer_range"
"""Keys about the random initialisation of weights."""
_LENGTHS = "max_position_embeddings max_sequence_length"
"""Keys about lengths, which a rotary embedding without scaling does not use."""
NO_INFLUENCE: Final = frozenset(" ".join((_THE_FILE, _RUNNING, _ANSWERS, _OTHER_HEADS, _START, _LENGTHS)).split())
"""Keys that do not change what the weights compute in any kind of model."""

REQUIRED_VALUES: Final[Mapping[str, HfField]] = {
    "add_cross_attention": fixed(False),
    "cross_attention_hidden_size": fixed(None),
    "is_encoder_decoder": fixed(False),
    "pruned_heads": fixed({}, None),
    "quantization_config": fixed(None),
    "tie_encoder_decoder": fixed(False),
}
"""Keys that must have these values in every kind of model, since another value changes what it computes."""
