"""A tokenizer as transformers loads it: tokenizer.json with the tokens of images, and the files beside it.

A SentencePiece model is written as the `tokenizers` library computes it: the same pieces, the same merges, the same
treatment of spaces, and the dummy prefix before every piece of text between special tokens, as the published data was
made. Whether that gives the same ids is tried on many texts before anything is written.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Final

from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from megatron_deepstack.convert.sentencepiece_model import (
    ModelKind,
    Piece,
    PieceKind,
    SentencePieceModel,
    read_sentencepiece,
)
from megatron_deepstack.data.text.hf_tokenizer import TOKENIZER_FILE
from megatron_deepstack.data.text.probe import SENTENCES
from megatron_deepstack.data.text.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SPACE: Final = "▁"


def transformers_files(
    tokenizer: Tokenizer, special: Sequence[str] = (IMAGE_TOKEN,), image_token: str = IMAGE_TOKEN
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of a tokenizer with the tokens that a model has for images, for transformers.

    Args:
        tokenizer: The run's tokenizer.
        special: Tokens that it must have; those that it lacks are added behind its others.
        image_token: The one of them that stands for an image.

    Returns:
        Content by name, and the ids of the special tokens.

    Raises:
        DataError: transformers' tokenizers cannot give the same ids.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = _from_sentencepiece(tokenizer)
    else:
        backend = Backend.from_buffer(tokenizer.files[TOKENIZER_FILE])
    _require_same_ids(tokenizer, backend)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    given = tokenizer.files.get(TOKENIZER_CONFIG)
    config = {} if given is None else json.loads(given)
    for key in ("auto_map", "processor_class", "added_tokens_decoder", "extra_special_tokens"):
        config.pop(key, None)
    names = {
        f"{role}_token": backend.id_to_token(number)
        for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
        if number is not None
    }
    config |= {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "image_token": image_token,
    }
    files = {
        **tokenizer.files,
        TOKENIZER_FILE: backend.to_str(pretty=True).encode(),
        TOKENIZER_CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }
    numbers = {name: backend.token_to_id(name) for name in special}
    assert None not in numbers.values(), numbers
    return files, {name: number for name, number in numbers.items() if number is not None}


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Backend:
    model = read_sentencepiece(tokenizer.model)
    pieces = model.pieces
    has_bytes = any(piece.kind is PieceKind.BYTE for piece in pieces)
    unknown = next(number for number, piece in enumerate(pieces) if piece.kind is PieceKind.UNKNOWN)
    if model.kind is ModelKind.BPE:
        backend = Backend(_bpe(pieces, unknown, has_bytes))
    elif model.kind is ModelKind.UNIGRAM:
        scores = [(piece.text, piece.score) for piece in pieces]
        backend = Backend(models.Unigram(scores, unk_id=unknown, byte_fallback=has_bytes))
    else:
        raise DataError(
            f"{tokenizer.source}: a SentencePiece model of kind {model.kind.name}, which tokenizer.json cannot hold; "
            "export with published names (--naming published)"
        )
    backend.normalizer = _normalizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in pieces if piece.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own = [piece.text for piece in pieces if piece.kind is PieceKind.USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in own])
    if tokenizer.bos_id is not None:
        begin = pieces[tokenizer.bos_id].text
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos_id)]
        )
    return backend


def _bpe(pieces: Sequence[Piece], unknown: int, has_bytes: bool) -> models.BPE:
    """Merges in the order of SentencePiece: the pair whose merged piece has the highest score is merged first."""
    numbers = {piece.text: number for number, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.kind is PieceKind.NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, numbers[left], numbers[right], left, right))
    merges.sort()
    return models.BPE(
        numbers,
        [(left, right) for *_, left, right in merges],
        unk_token=pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=has_bytes,
    )


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """What happens to a piece of text before it is cut up: as the model says, then spaces become a letter."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.removes_extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.adds_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _require_same_ids(tokenizer: Tokenizer, backend: Backend) -> None:
    """Refuse a tokenizer.json that gives other ids than the run's tokenizer, tried on sentences and drawn texts."""
    for text in (*SENTENCES, *_drawn_texts(tokenizer)):
        ours, theirs = tokenizer.encode(text), backend.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise DataError(
                f"{tokenizer.source}: written as tokenizer.json it gives {text[:40]!r} the ids {theirs[:12]}, and "
                f"itself {ours[:12]}; export with published names (--naming published), or give the tokenizer.json "
                "that belongs to the model (data.tokenizer=...)"
            )


def _drawn_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of the tokenizer's own words in a drawn order."""
    draw = random.Random(0)
    texts = []
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(12)]
        texts.append("".join(tokenizer.decode([number]) + draw.choice(("", " ")) for number in ids))
    return [text for text in texts if not any(mark in text for mark in ("<", "\x00", "\ufffd"))]
