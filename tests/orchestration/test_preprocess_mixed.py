"""Preprocessing for views of any size: sizes and pixels as published, one result whoever does it, faults by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.data.images.processors import processor_of
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.storekeeping.choose import load
from megatron_deepstack.storekeeping.show import page
from megatron_deepstack.storekeeping.stats import statistics
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny import tiny_qwen3_vl
from megatron_deepstack.testing.tiny_chat import QWEN3_VL_TOKENS, QWEN3_VL_WORDS, QWEN_CONFIG, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import jpeg_bytes, record, write_records
from orchestration.preprocess.driver.run import preprocess
from orchestration.preprocess.driver.summary import Summary
from orchestration.preprocess.part import work

Same = Callable[[Path, Path], None]
SIZES = [(90, 60), (40, 300), (640, 480), (17, 23), (33, 33), (2010, 10), (800, 600), (64, 64)]
"""Pictures of the corpus: the sixth is too long."""


@dataclass(frozen=True)
class Corpus:
    """Files for a job, and the job."""

    folder: Path

    def preprocess(self, output: Path, workers: int = 0) -> Summary:
        return preprocess(self.recipe, str(output), workers=workers)

    @property
    def recipe(self) -> Recipe:
        model = tiny_qwen3_vl()
        data = DataConfig(
            records=(str(self.folder / "records.json"),),
            images=str(self.folder / "photos"),
            tokenizer=str(self.folder / "tokenizer"),
            template="qwen3_vl",  # type: ignore[arg-type]
            images_per_part=3,
            max_quarantined=0.5,
            min_pixels=40 * 40,
            max_pixels=400 * 300,
        )
        return Recipe(model=replace(model, language=replace(model.language, vocab_size=512)), data=data)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "photos").mkdir()
    names = [f"{width}x{height}.jpg" for width, height in SIZES]
    for seed, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        (folder / "photos" / name).write_bytes(jpeg_bytes(*size, seed=seed))
    records = [record(f"r{number}", [name]) for number, name in enumerate(names)]
    records += [
        record("three", [names[2], names[0], names[7]]),
        record("text", []),
        record("bad", [names[5], names[0]]),
    ]
    write_records(folder / "records.json", records)
    write_chat_tokenizer(folder / "tokenizer", QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)
    return Corpus(folder)


@pytest.fixture(scope="module")
def made(mixed: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "store"
    mixed.preprocess(output)
    return output


def test_the_store_holds_the_published_views(mixed: Corpus, made: Path) -> None:
    store, processor = Store.open(made), processor_of(mixed.recipe)
    assert isinstance(processor, SizedProcessor)
    stored = [number for number, size in enumerate(SIZES) if size != (2010, 10)]
    for number, view in zip(stored, store.read_whole(stored), strict=True):
        image = store.image(number)
        photo = np.asarray(Image.open(mixed.folder / "photos" / image.path))
        expected, grid = processor.view_of(photo)
        np.testing.assert_array_equal(view, expected[None])
        assert (image.grid, image.size) == (grid, SIZES[number])
    assert store.grid(2) == ViewGrid(frames=1, height=74, width=100)
    assert not verify(str(made), processes=1)


def test_placeholders_and_rows(mixed: Corpus, made: Path) -> None:
    store = Store.open(made)
    by_id = {store.sample(number).id: number for number in range(len(store))}
    assert list(by_id) == ["r0", "r1", "r2", "r3", "r4", "r6", "r7", "three", "text"]
    sample = store.sample(by_id["three"])
    assert (sample.tokens == IMAGE_TOKEN_ID).sum() == 3
    rows = [store.grid(image).num_tokens(2) for image in sample.images]  # type: ignore[union-attr]
    lengths = expanded_lengths(store, mixed.recipe.model)
    assert lengths[by_id["three"]] == len(sample.tokens) - 3 + sum(rows)


def test_a_picture_that_is_too_long_is_listed_with_its_samples(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "quarantine.jsonl").read_text().splitlines()]
    assert [line.get("path", line.get("id")) for line in lines] == ["2010x10.jpg", "r5", "bad"]
    assert "an image of 2010x10 pixels: its sides have a ratio of 201, and at most 200" in lines[0]["reason"]
    report = json.loads((made / "report.json").read_text())
    assert {name: report[name] for name in ("images", "views", "quarantined", "samples", "dropped")} == {
        "images": 8, "views": 7, "quarantined": 1, "samples": 9, "dropped": 2,
    }  # fmt: skip


def test_ray_writes_the_same_bytes(
    mixed: Corpus, made: Path, local_ray: None, tmp_path: Path, same_store: Same
) -> None:
    mixed.preprocess(tmp_path / "store", workers=2)
    same_store(made, tmp_path / "store")


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_stopped_anywhere_the_same_command_goes_on(
    mixed: Corpus, made: Path, tmp_path: Path, same_store: Same, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    commit, done = work.Ledger.commit, []

    def stopping(self: Any, name: str, entry: Any) -> None:
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(name)
        commit(self, name, entry)

    with monkeypatch.context() as stopped:
        stopped.setattr(work.Ledger, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            mixed.preprocess(tmp_path / "store")
    summary = mixed.preprocess(tmp_path / "store")
    assert summary.parts_done_before == stop_at
    same_store(made, tmp_path / "store")


def test_other_limits_are_another_plan(mixed: Corpus, made: Path, tmp_path: Path) -> None:
    recipe = replace(mixed.recipe, data=replace(mixed.recipe.data, max_pixels=90_000))
    with pytest.raises(StoreError, match=r"processor.max_pixels: 120000 there, 90000 asked for"):
        preprocess(recipe, str(made), workers=0)


def test_a_disk_that_is_too_small_is_refused_by_what_the_views_take(
    mixed: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.preprocess.driver import space

    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(StoreError, match=r"about 1.\d+ MB are needed \(estimated from 8 of 8 images"):
        mixed.preprocess(tmp_path / "store")


def test_the_page_and_the_statistics_tell_of_sizes(mixed: Corpus, made: Path) -> None:
    store, model = load(str(made), None)
    guessed = page(store, model, range(len(store)), None)
    assert "90x60.jpg, 90 x 60 pixels; the view has 88 x 64 and 88 tokens" in guessed
    assert "from the output of ViT layer" not in guessed
    known = page(store, mixed.recipe.model, [0], None)
    assert "stack 0, from the output of ViT layer 0, added before layer 1" in known
    assert "stack 1, from the output of ViT layer 2, added before layer 2" in known
    found = statistics(store, mixed.recipe.model)
    titles = {one.title: sum(count for _, count in one.bins) for one in found.histograms}
    assert titles["tokens of a view"] == titles["longer side of a view, pixels"] == 7
    document = found.document()
    assert document["view_pixels"] is None
    assert document["pixel_bytes"] == sum(view.size for view in store.read_whole([0, 1, 2, 3, 4, 6, 7]))


def test_a_store_of_one_size_and_a_model_of_any_do_not_fit(mixed: Corpus, made: Path, serial: Path) -> None:
    from megatron_deepstack.data.images.processor import check_store
    from megatron_deepstack.testing.tiny_data import tiny_recipe

    with pytest.raises(StoreError, match=r"model.variant 'qwen3_vl' needs the views 'native', it holds 'crops'"):
        check_store(Store.open(serial), mixed.recipe.model)
    with pytest.raises(StoreError, match=r"model.variant 'deepstack_l' needs the views 'crops', it holds 'native'"):
        check_store(Store.open(made), tiny_recipe().model)
    other = replace(mixed.recipe.model, vision=replace(mixed.recipe.model.vision, merge_size=4, patch_size=16))
    with pytest.raises(StoreError, match=r"model.vision.patch_size is 16, .* 4\n  model.vision.merge_size is 4, .* 2"):
        check_store(Store.open(made), other)
