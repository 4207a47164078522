"""Views, token ids and labels equal the published implementation's; a difference is found and located."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import DataError, ParityError
from megatron_deepstack.testing.published.reference_data import check_conversations, check_crops


def test_crops_are_equal(reference: Path) -> None:
    lines = check_crops(reference / "crops", reference / "photos")
    assert {line.case.rpartition(".")[2] for line in lines} == {"bestgrid", "2xsample", "anyres"}
    assert str(lines[0]) == "equal  waterview.bestgrid: 5 views of 112 pixels, grid 2x2"


def test_conversations_are_equal(reference: Path) -> None:
    file, model = reference / "conversations" / "conversations.json", reference / "tokenizer" / "llama2.model"
    assert {line.case for line in check_conversations(file, model)} >= {
        "caption",
        "one_turn",
        "three_turns",
        "text_only",
    }


def test_one_changed_value_is_found(reference: Path, tmp_path: Path) -> None:
    views = dict(np.load(reference / "crops" / "crops.npz"))
    views["radar.anyres"] = views["radar.anyres"].copy()
    views["radar.anyres"][7, 2, 30, 40] ^= 1
    np.savez(tmp_path / "crops.npz", **views)
    shutil.copy(reference / "crops" / "crops.json", tmp_path)
    with pytest.raises(ParityError, match=r"radar.anyres: 1 of \d+ values, .*\(view 7, channel 2, row 30, column 40\)"):
        check_crops(tmp_path, reference / "photos")


@pytest.mark.parametrize(("key", "noun"), [("input_ids", "token"), ("labels", "label")])
def test_one_changed_token_is_found(reference: Path, tmp_path: Path, key: str, noun: str) -> None:
    document = json.loads((reference / "conversations" / "conversations.json").read_text())
    document["samples"][1][key][60] = 7
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ParityError, match=rf"one_turn: {noun} 60 is \d+, expected 7(.|\n)*1 of 5 conversations"):
        check_conversations(path, reference / "tokenizer" / "llama2.model")


def test_other_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"crops.json: cannot be read"):
        check_crops(tmp_path, tmp_path)
    (tmp_path / "conversations.json").write_text("[]")
    with pytest.raises(DataError, match="holds no `samples`"):
        check_conversations(tmp_path / "conversations.json", tmp_path)
    (tmp_path / "conversations.json").write_text('{"samples": [{"id": "x", "conversations": [{"from": "me"}]}]}')
    (tmp_path / "tiny.model").write_bytes(tokenizer.model)
    with pytest.raises(DataError, match="a sample is not in the expected format: ValueError: 'me' is not a valid Role"):
        check_conversations(tmp_path / "conversations.json", tmp_path / "tiny.model")
    (tmp_path / "crops.json").write_text('{"a.bestgrid": {}}')
    np.savez(tmp_path / "crops.npz", **{"a.bestgrid": np.zeros((5, 3, 8, 8), np.uint8)})
    with pytest.raises(DataError, match=r"crops.npz: not in the expected format: KeyError: 'crop_size'"):
        check_crops(tmp_path, tmp_path)
