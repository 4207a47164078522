"""The reader of SentencePiece models finds what the reader of the package `sentencepiece` finds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_deepstack.convert.sentencepiece_model import read_sentencepiece
from megatron_deepstack.testing.tiny_data import write_tokenizer

LINES = ["What is it? A photo of a cat.", "Which number is printed there? 0 1 2 3 4 5 6 7 8 9", "ÄÖÜ ﬁnd ½ 日本"]


def trained(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=buffer,
        model_type=kind,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return buffer.getvalue()


MODELS = {
    "unigram with rules of characters": {"kind": "unigram"},
    "pairs without rules": {"kind": "bpe", "normalization_rule_name": "identity", "add_dummy_prefix": False},
    "own and control pieces": {"kind": "bpe", "user_defined_symbols": ["<cat>"], "control_symbols": ["<image>"]},
    "letters": {"kind": "char", "remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_it_reads_what_the_package_reads(options: dict[str, Any]) -> None:
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=Exception)
    content = trained(**options)
    theirs, ours = proto.ModelProto.FromString(content), read_sentencepiece(content)
    assert [(piece.text, piece.score, piece.kind) for piece in ours.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in theirs.pieces
    ]
    assert ours.kind == theirs.trainer_spec.model_type
    rules = theirs.normalizer_spec
    assert ours.charsmap == rules.precompiled_charsmap
    assert (ours.adds_dummy_prefix, ours.removes_extra_spaces) == (
        rules.add_dummy_prefix,
        rules.remove_extra_whitespaces,
    )


def test_no_protobuf_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that SentencePiece itself names, where its own reader cannot be imported."""
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    path = write_tokenizer(tmp_path / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = read_sentencepiece(path.read_bytes())
    assert [piece.text for piece in found.pieces] == [processor.id_to_piece(n) for n in range(len(processor))]
