"""A small SentencePiece tokenizer of LLaMA's kind, trained on the demo's own conversations.

As in LLaMA's tokenizer, byte fallback makes any text encodable, each digit is a token, <unk>, <s> and </s> are 0, 1 and
2, and padding has no id of its own. The words that the conversation template adds are learned as well: letter by
letter, the system line alone would cost a hundred tokens in each sample.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import sentencepiece

from megatron_deepstack.data.text.conversation import Template, encode_prompt
from megatron_deepstack.data.text.tokenizer import SentencePieceTokenizer

VOCABULARY_SIZE = 480
"""Ids of the trained model; 259 of them are bytes and control tokens."""


def train_vocabulary(questions: Sequence[str], answers: Sequence[str]) -> bytes:
    """Train the tokenizer. The same texts give the same bytes: no path or time enters the model.

    Args:
        questions: All questions of the data set.
        answers: All answers of the data set.

    Returns:
        Content of tokenizer.model.
    """
    spelling = SentencePieceTokenizer(_train([*questions, *answers], "char", None), "the demo's characters")
    prompts = [spelling.decode(encode_prompt(question, Template.V1, spelling).tolist()) for question in questions]
    return _train([*prompts, *answers], "bpe", VOCABULARY_SIZE)


def _train(sentences: Sequence[str], model_type: str, vocabulary_size: int | None) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocabulary_size or 8000,
        use_all_vocab=vocabulary_size is None,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
