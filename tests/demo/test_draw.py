"""The demo's data set: repeatable, valid, split cleanly, and legible in the crops only."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageFont

from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.text.conversation import Template, encode_conversation
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.demo.draw import QUESTIONS, draw
from megatron_deepstack.demo.page import CELL_PIXELS, GRID_SHARES, VIEW_PIXELS, compose_page, lattice
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.views import best_grid

PAGES = [compose_page(random.Random(f"page {number}")) for number in range(400)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("drawn") / "data"
    draw(output, num_train=12, num_heldout=5, seed=3)
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes(data: Path, tmp_path: Path) -> None:
    draw(tmp_path / "again", num_train=12, num_heldout=5, seed=3)
    assert files(tmp_path / "again") == files(data)


def test_another_seed_another_set_and_more_pictures_extend_it(data: Path, tmp_path: Path) -> None:
    draw(tmp_path / "more", num_train=13, num_heldout=5, seed=3)
    draw(tmp_path / "other", num_train=12, num_heldout=5, seed=4)
    ours, more, other = (files(folder / "images") for folder in (data, tmp_path / "more", tmp_path / "other"))
    assert ours.items() < more.items()
    assert not set(ours.values()) & set(other.values())


def test_records_are_llava_style_and_splits_share_no_picture(data: Path) -> None:
    train, heldout = (json.loads((data / f"{split}.json").read_text()) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (12, 5)
    contents = []
    for record in train + heldout:
        question, answer = record["conversations"]
        assert (question["from"], answer["from"]) == ("human", "gpt")
        assert question["value"].removeprefix("<image>\n") in QUESTIONS
        assert len(answer["value"]) == 2
        assert answer["value"].isdecimal()
        contents.append((data / "images" / record["image"]).read_bytes())
    assert len(set(contents)) == len({record["id"] for record in train + heldout}) == 17


def test_tokenizer_is_llamas_kind_and_covers_the_template_in_words(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.vocab_size <= 512
    turns = [Turn(Role.HUMAN, f"<image>\n{QUESTIONS[0]}"), Turn(Role.GPT, "47")]
    tokens, mask = encode_conversation(turns, Template.V1, tokenizer)
    assert len(tokens) < 64
    assert tokenizer.decode(tokens[mask == 1].tolist()).strip() == "47"
    odd = "Ünknown wörds, 漢字\n"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_model_file_names_no_folder(data: Path) -> None:
    assert str(data).encode() not in (data / "tokenizer.model").read_bytes()


def test_preprocessing_picks_the_grid_a_page_was_drawn_for() -> None:
    assert Counter(page.grid for page in PAGES).keys() == GRID_SHARES.keys()
    for page in PAGES:
        assert best_grid(*page.size, VIEW_PIXELS, num_crops=4) == page.grid, page.size


def test_digits_are_legible_in_the_crops_and_too_small_for_the_global_view() -> None:
    """The smallest digit fonts are 3 x 5 pixels. Measured: 3.4 to 4.0 x 3.9 to 4.9 pixels in the crops."""
    for page in PAGES:
        left, top, right, bottom = ImageFont.load_default(page.font_size).getbbox("0")
        width, height = (
            (end - start) * CELL_PIXELS / side
            for start, end, side in zip((left, top), (right, bottom), page.cell_size, strict=True)
        )
        assert width >= 3
        assert height >= 3.9
        assert width / page.grid[0] < 2 or height / page.grid[1] < 2.5


def test_every_number_occurs_and_is_printed_somewhere() -> None:
    assert len({compose_page(random.Random(number)).number for number in range(1500)}) == 100
    for page in PAGES[:20]:
        columns, rows = lattice(page.grid)
        assert page.places
        assert all(0 < x < columns and 0 < y < rows for x, y in page.places)


def test_existing_data_set_is_not_touched(data: Path) -> None:
    before = files(data)
    with pytest.raises(DataError, match=r"train\.json exists: .* holds a data set already"):
        draw(data, num_train=1, num_heldout=1, seed=3)
    assert files(data) == before


def test_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the data set: Not a directory"):
        draw(tmp_path / "file" / "data", num_train=1, num_heldout=1, seed=1)
