"""Tiny Hugging Face tokenizers with the control tokens of Llama 3, Qwen and Granite, made on the spot for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LLAMA_3_TOKENS: Final = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
QWEN_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_VL_TOKENS: Final = (*QWEN_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN3_VL_WORDS: Final = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Tokens of their own that are no control tokens: a text that contains them becomes them."""
GRANITE_4_TOKENS: Final = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<image>")
LLAMA_3_CONFIG: Final = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN_CONFIG: Final = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GRANITE_4_CONFIG: Final = {
    "bos_token": "<|end_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|end_of_text|>",
}
_WORDS: Final = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""How text is cut before pairs are merged, in the way of those tokenizers."""
_LINES: Final = (
    "system user assistant You are a helpful assistant. What is it? A photo. Which number is printed there?",
    "0 1 2 3 4 5 6 7 8 9 answer the question is it a photo of a number\n\nWhat is the number\nis it?\n",
)


def write_chat_tokenizer(
    folder: Path, control: Sequence[str], config: dict[str, Any] | None, words: Sequence[str] = ()
) -> Path:
    """Make a byte-level tokenizer with control tokens.

    Args:
        folder: Where `tokenizer.json` is written; made if it is not there.
        control: The control tokens, such as `QWEN_TOKENS`.
        config: Content of `tokenizer_config.json`; None leaves that file out.
        words: Tokens of their own that are no control tokens, such as `QWEN3_VL_WORDS`.

    Returns:
        The folder.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in words])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
