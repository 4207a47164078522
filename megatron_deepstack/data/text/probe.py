"""What a tokenizer does, as one short text: two tokenizers with the same probe give sentences the same ids.

The files of a tokenizer may be written again by another program, with other bytes and the same behaviour. So a model
that is exported records the probe of its tokenizer, and not a checksum of files.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from megatron_deepstack.data.text.tokenizer import Tokenizer

SENTENCES: Final = (
    "A chat between a curious user and an artificial intelligence assistant. USER: What is this? ASSISTANT:",
    "\nWhat does the sign say?",
    "  two  spaces \n\n lines\tand a tab ",
    "Größe, naïve, Ελλάδα, Москва, 東京, 日本語のテキスト, 한국어, عربى, 😀👍🏽",
    '3.14159 1,000,000 x^2 + y_1 = f(x); {"a": [1, 2]} <b>bold</b> https://example.org/a?b=c&d=%20',
    "",
    " ",
)
"""Texts in which tokenizers differ: cases, digits, spaces, scripts, signs."""


def probe(tokenizer: Tokenizer) -> str:
    """The sha256 of the ids that a tokenizer gives to `SENTENCES`.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    ids = [tokenizer.encode(sentence) for sentence in SENTENCES]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
