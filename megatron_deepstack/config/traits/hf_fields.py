"""What the keys of a Hugging Face config.json mean to us, as data that is read in both directions.

A config describes mathematics. We accept it only if every key of it is understood: *read* (it must equal what the
recipe says), *fixed* (we compute one thing, and it must say that) or *without influence* on what the weights compute.
Any other key is refused by name, since it may change the result. The same rows write the config of an export.

Keys that mean something together (the rotary embedding, attention windows) are judged by `convert.hf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True, slots=True)
class HfField:
    """One key of a config.json."""

    default: Any = None
    """What transformers takes where the key is absent."""
    reads: str | None = None
    """The recipe's field, or a number derived from it, that the value must equal."""
    compared: bool = True
    """False for sizes that the shapes of the tensors show anyway; they are only written."""
    fixed: tuple[Any, ...] = ()
    """The values under which the result is what we compute; the first one is written."""
    written: bool = True
    """Whether an export says it."""


def read(ours: str, default: Any = None) -> HfField:
    """A key that must equal the recipe's `ours`; `default` is what transformers takes where it is absent."""
    return HfField(reads=ours, default=default)


def shape(ours: str) -> HfField:
    """A size that the tensors' shapes show; written, not compared."""
    return HfField(reads=ours, compared=False)


def fixed(*values: Any, default: Any = None, written: bool = False) -> HfField:
    """A key that must have one of `values`; absent it has `default`, or the first of them."""
    return HfField(fixed=values, default=values[0] if default is None else default, written=written)


IGNORED: Final = HfField(compared=False, written=False)
"""A key that changes nothing in one kind of model, although it may in another."""

_THE_FILE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    dtype finetuning_task model_type name_or_path prefix problem_type task_specific_params tokenizer_class torch_dtype
    transformers_version unsloth_fixed unsloth_version
"""
"""What a file says of itself, and how it was written."""
_RUNNING = """
    chunk_size_feed_forward gradient_checkpointing is_decoder output_attentions output_hidden_states output_scores
    return_dict return_dict_in_generate tf_legacy_loss torchscript use_bfloat16 use_cache use_return_dict
"""
"""How transformers runs a model, not what it computes."""
_ANSWERS = """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences pad_token_id remove_invalid_values repetition_penalty sep_token_id suppress_tokens temperature
    tokenizer_model_max_length tokenizer_padding_side top_k top_p typical_p
"""
"""How answers are generated, and special tokens."""
_OTHER_HEADS = "id2label label2id num_labels"
"""Heads for classification, which have tensors of their own."""
_START = "initializer_factor initializer_range"
"""How weights were drawn."""
_LENGTHS = "max_position_embeddings max_sequence_length"
"""Lengths, at which a rotary embedding without scaling does not look."""
NO_INFLUENCE: Final = frozenset(" ".join((_THE_FILE, _RUNNING, _ANSWERS, _OTHER_HEADS, _START, _LENGTHS)).split())
"""Keys, of any model, that do not change what its weights compute."""

NOT_SO: Final[Mapping[str, HfField]] = {
    "add_cross_attention": fixed(False),
    "cross_attention_hidden_size": fixed(None),
    "is_encoder_decoder": fixed(False),
    "pruned_heads": fixed({}, None),
    "quantization_config": fixed(None),
    "tie_encoder_decoder": fixed(False),
}
"""Keys, of any model, that change what it computes if they say anything else."""
