"""The examples: each is a sound recipe, listed on its page, and trains on a few pictures with its model made tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import run
from pages import ROOT, text_of

from megatron_deepstack.planning.check import load_checked_recipe
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TINY = [
    "model.vision.image_size=28",
    "model.vision.hidden_size=32",
    "model.vision.ffn_hidden_size=64",
    "model.vision.num_layers=2",
    "model.vision.num_heads=4",
    "model.vision.select_layer=-1",
    "model.language.vocab_size=512",
    "model.language.hidden_size=32",
    "model.language.ffn_hidden_size=64",
    "model.language.num_layers=6",
    "model.language.num_heads=4",
    "parallel.pipeline=1",
    "parallel.distributed_optimizer=false",
    "train.precision=fp32",
    "train.steps=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.init_from=null",
    "data.tokenizer=tiny.model",
    "run_dir=run",
]
"""What makes any of them small enough for a test; everything else stays the example's own."""
MARKS = {"mixture_packed": ["train.validation_interval=1"]}
"""What an example would do later than a test looks."""


def name_of(file: Path) -> str:
    return file.stem


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_it_is_a_sound_recipe(file: Path):
    load_checked_recipe(file)


def test_the_page_lists_them_all():
    page = text_of(ROOT / "examples" / "README.md")
    assert not [file.name for file in EXAMPLES if f"]({file.name})" not in page]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with eight pictures, records about them, and a tokenizer."""
    names = write_photos(tmp_path / "images", 8)
    write_records(tmp_path / "records.json", [record(name, [name]) for name in names])
    write_tokenizer(tmp_path / "tiny.model")
    return tmp_path


def preprocess(file: Path, workplace: Path, store: str, *sources: str) -> None:
    run(["preprocess", str(file), "--workers", "0", *TINY, f"data.store={store}", *sources], workplace)


def in_folder(file: Path, workplace: Path) -> list[str]:
    """Makes the example's store in a folder; returns the overrides that name it."""
    preprocess(file, workplace, "a.zarr", "data.records=records.json", "data.images=images")
    return ["data.store=a.zarr"]


def of_several(file: Path, workplace: Path) -> list[str]:
    """Makes two stores and a held-out one."""
    for store in ("a.zarr", "b.zarr", "heldout.zarr"):
        sources = ("data.records=records.json", "data.images=images", "data.stores=null", "data.weights=null")
        preprocess(file, workplace, store, *sources)
    return ["data.stores=[a.zarr,b.zarr]", "data.validation_store=heldout.zarr"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", [file for file in EXAMPLES if file.stem != "bucket"], ids=name_of)
def test_it_trains(file: Path, workplace: Path):
    make = of_several if file.stem == "mixture_packed" else in_folder
    said = run(["train", str(file), *TINY, *make(file, workplace), *MARKS.get(file.stem, [])], workplace)
    assert "step 2/2" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bucket_trains(workplace: Path, bucket: str):
    import s3fs

    system: Any = s3fs.S3FileSystem()
    system.put(str(workplace / "images"), f"{bucket}/images", recursive=True)
    system.put(str(workplace / "records.json"), f"{bucket}/records/all.json")
    file = ROOT / "examples" / "bucket.yaml"
    preprocess(
        file, workplace, f"{bucket}/a.zarr", f"data.records={bucket}/records/*.json", f"data.images={bucket}/images"
    )
    said = run(["train", str(file), *TINY, f"data.store={bucket}/a.zarr", "data.cache_dir=cache"], workplace)
    assert "step 2/2" in said
