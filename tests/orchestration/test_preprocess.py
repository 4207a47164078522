"""Preprocessing: one result, whoever does it, however often it is killed; nothing bad passes silently."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import DataConfig, LanguageConfig
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import ImageStatus, shard_path
from megatron_deepstack.data.text.conversation import encode_conversation
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError, StoreError
from megatron_deepstack.planning.views import best_grid
from megatron_deepstack.testing.tiny_data import record, tiny_recipe, write_records
from orchestration.preprocess.driver import run, tasks
from orchestration.preprocess.driver.lease import hold_lease
from orchestration.preprocess.part import work

Same = Callable[[Path, Path], None]


def test_the_store_holds_what_went_in(corpus: Any, serial: Path) -> None:
    store, tokenizer = Store.open(serial), load_tokenizer(corpus.tokenizer)
    assert [store.sample(n).id for n in range(len(store))] == [
        *(f"r{n}" for n in range(10) if n not in (3, 9)), "again", "two", "text", "last",
    ]  # fmt: skip
    sample = store.sample(1)
    turns = [Turn(Role.HUMAN, "<image>\nWhat is it?"), Turn(Role.GPT, "Photo 1.")]
    tokens, mask = encode_conversation(turns, "v1", tokenizer)
    np.testing.assert_array_equal(sample.tokens, tokens)
    np.testing.assert_array_equal(sample.loss_mask, mask)
    image = store.image(sample.images[0])
    photo = Image.open(corpus.images / image.path)
    assert image.path == "photo001.jpg"
    assert image.size == photo.size
    assert image.grid == best_grid(*photo.size, 28, 4)
    views = store.read_views(sample.images[0], range(image.count))
    np.testing.assert_array_equal(views[0], np.asarray(photo.resize((28, 28))))


def test_images_are_stored_once_and_shared(serial: Path) -> None:
    store = Store.open(serial)
    assert store.num_images == 14
    by_id = {store.sample(n).id: store.sample_images(n) for n in range(len(store))}
    assert by_id["again"] == by_id["r0"]
    assert len(by_id["two"]) == 2
    assert by_id["text"] == ()


def test_broken_images_and_their_samples_are_listed(serial: Path) -> None:
    lines = [json.loads(line) for line in (serial / "quarantine.jsonl").read_text().splitlines()]
    flagged = [line for line in lines if line["kind"] == "image flagged"]
    assert [(line["path"], line["reason"][:12]) for line in flagged] == [("photo005.jpg", "damaged JPEG")]
    assert [line for line in lines if line not in flagged] == [
        {"kind": "image quarantined", "path": "photo003.jpg", "reason": "not an image of a known format"},
        {"kind": "image quarantined", "path": "photo009.jpg", "reason": "no such file"},
        {"kind": "sample dropped", "id": "r3", "images": ["photo003.jpg"]},
        {"kind": "sample dropped", "id": "r9", "images": ["photo009.jpg"]},
        {"kind": "sample dropped", "id": "two, one broken", "images": ["photo003.jpg"]},
    ]
    store = Store.open(serial)
    broken = store.image(3)
    assert (broken.status, broken.count, broken.path) == (ImageStatus.QUARANTINED, 0, "photo003.jpg")
    with pytest.raises(StoreError, match="has 0 views"):
        store.read_views(3, [0])
    assert store.image(5).status is ImageStatus.FLAGGED
    assert store.read_views(5, [0]).any()
    counts = store.attributes.counts
    assert (counts["images"], counts["quarantined"], counts["samples"], counts["dropped"]) == (14, 2, 12, 3)
    report = json.loads((serial / "report.json").read_text())
    assert {name: report[name] for name in counts} == counts


def test_zarr_python_reads_the_whole_store(serial: Path) -> None:
    store, group = Store.open(serial), zarr.open_group(serial, mode="r")
    for number in range(store.num_images):
        image = store.image(number)
        ours = store.read_views(number, range(image.count))
        np.testing.assert_array_equal(ours, group["images/pixels"][image.start : image.start + image.count])


def test_ray_writes_the_same_bytes(
    corpus: Any, serial: Path, local_ray: None, tmp_path: Path, same_store: Same
) -> None:
    summary = corpus.preprocess(tmp_path / "store", workers=2)
    same_store(serial, tmp_path / "store")
    assert summary.images == 14


def test_a_finished_store_is_left_alone(corpus: Any, serial: Path, tmp_path: Path, same_store: Same) -> None:
    output = Path(shutil.copytree(serial, tmp_path / "store"))
    report = (serial / "report.json").read_bytes()
    done = corpus.preprocess(output)
    assert (done.store, done.samples, done.parts, done.parts_done_before) == (str(output), 12, 5, 5)
    assert (done.nodes, done.written_bytes, done.images_per_second, done.images_done_before) == ({}, 0, 0, 14)
    assert (output / "report.json").read_bytes() == report, "it tells of the job that made the store"
    (output / "report.json").unlink()
    assert corpus.preprocess(output).samples == 12
    assert json.loads((output / "report.json").read_text())["parts"] == 5
    same_store(serial, output)


def test_the_command_says_that_a_store_is_complete_already(corpus: Any, serial: Path, tmp_path: Path) -> None:
    """And not the megabytes and seconds of the job that made it."""
    recipe = tiny_recipe()
    data = replace(
        recipe.data, records=(str(corpus.records),), images=str(corpus.images), tokenizer=str(corpus.tokenizer)
    )
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe_to_yaml(replace(recipe, data=data)))
    command = ["preprocess", str(written), "--workers", "0"]
    stores = (Path(shutil.copytree(serial, tmp_path / "old")), tmp_path / "new")
    old, new = (CliRunner().invoke(app, [*command, f"data.store={store}"]) for store in stores)
    assert (old.exit_code, new.exit_code) == (0, 0), old.output + new.output
    assert f"{stores[0]}: 12 samples, 14 images" in old.output
    assert "of them learned; the store is complete already, no part was left to do" in old.output
    assert "images/s" not in old.output
    assert re.search(r"of them learned; [\d.]+ [kM]B in [\d.]+ s, \d+ images/s", new.output)
    assert "complete already" not in new.output


KILLER = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[4])
from megatron_deepstack.testing.tiny_data import tiny_recipe
from megatron_deepstack.data import location
from orchestration.preprocess.driver import progress, run, summary, tasks
from orchestration.preprocess.part import finalise, ledger, work

def die_at_call(owner, name, number):
    original, calls = getattr(owner, name), []
    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, dying)

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    die_at_call(eval(sys.argv[2]), sys.argv[3].split(":")[0], int(sys.argv[3].split(":")[1]))
    run.preprocess(tiny_recipe(), **job)
"""


def run_and_die(corpus: Any, output: Path, owner: str, call: str, workers: int) -> None:
    """Run a job in a process of its own that kills itself, with SIGKILL, at the given call."""
    job = {"output": str(output), "records": str(corpus.records), "images": str(corpus.images)}
    job |= {"tokenizer": str(corpus.tokenizer), "workers": workers}
    command = [sys.executable, "-c", KILLER, json.dumps(job), owner, call, json.dumps(sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == -signal.SIGKILL, f"the fault did not fire: {process.stderr}"


@pytest.mark.parametrize(
    ("owner", "call", "parts_done"),
    [
        ("ledger", "write_json:1", 0),
        ("run", "begin_store:1", 0),
        ("work.Ledger", "commit:3", 2),
        ("location.os", "link:3", 1),
        ("work.ShardWriter", "finish:4", 3),
        ("finalise", "write_attributes:1", 5),
        ("finalise", "clear_leftovers:1", 5),
        ("summary", "write_json:1", 5),
    ],
)
def test_killed_anywhere_the_same_command_goes_on(
    corpus: Any, serial: Path, tmp_path: Path, same_store: Same, owner: str, call: str, parts_done: int
) -> None:
    output = tmp_path / "store"
    run_and_die(corpus, output, owner, call, workers=0)
    assert len(list(output.glob("parts/[a-z]*.json"))) == parts_done
    corpus.preprocess(output)
    same_store(serial, output)


@pytest.mark.slow
def test_a_killed_driver_of_ray_goes_on_from_what_was_done(
    corpus: Any, serial: Path, local_ray: None, tmp_path: Path, same_store: Same
) -> None:
    output = tmp_path / "store"
    run_and_die(corpus, output, "progress.JobProgress", "add:2", workers=2)
    assert len(list(output.glob("parts/[a-z]*.json"))) >= 2
    with pytest.raises(StoreError, match="has not finished"):
        Store.open(output)
    summary = corpus.preprocess(output, workers=2)
    assert summary.images_done_before >= 2
    same_store(serial, output)


def test_a_killed_worker_is_replaced(
    corpus: Any, serial: Path, local_ray: None, tmp_path: Path, same_store: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = tmp_path / "fired"

    def die_once(job: work.Job, part: Any, original: Any = work.do_part) -> work.PartDone:
        if part.name == "images-000001" and not fired.exists():
            fired.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        done: work.PartDone = original(job, part)
        return done

    monkeypatch.setattr(tasks, "do_part", by_value(die_once))
    corpus.preprocess(tmp_path / "store", workers=2)
    assert fired.exists(), "the fault did not fire"
    same_store(serial, tmp_path / "store")


@pytest.mark.slow
def test_a_part_that_always_kills_its_worker_is_named(
    corpus: Any, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(job: work.Job, part: Any) -> work.PartDone:
        if part.name == "images-000002":
            os.kill(os.getpid(), signal.SIGKILL)
        return work.PartDone(part.name)

    monkeypatch.setattr(tasks, "do_part", by_value(die))
    with pytest.raises(DataError, match=r"part images-000002 \(photo008.jpg, .*its worker died 4 times"):
        corpus.preprocess(tmp_path / "store", workers=2)


def by_value(function: Any) -> Any:
    """The function as Ray should send it: whole, since workers cannot import this test."""
    function.__module__ = "__main__"
    return function


@pytest.mark.parametrize(
    ("damage", "redone"),
    [
        (lambda root: (root / shard_path(1)).unlink(), "images-000001.json"),
        (lambda root: (root / shard_path(1)).write_bytes(b"torn"), "images-000001.json"),
        (lambda root: (root / "parts/images-000002.json").write_text('{"plan'), "images-000002.json"),
        (lambda root: (root / "parts/text-000000.bin").unlink(), "text-000000.json"),
    ],
    ids=["shard lost", "shard torn", "record torn", "tokens lost"],
)
def test_parts_whose_data_is_gone_are_done_again(
    corpus: Any, serial: Path, tmp_path: Path, same_store: Same, damage: Callable[[Path], Any], redone: str
) -> None:
    output = tmp_path / "store"
    run_and_die(corpus, output, "finalise", "write_attributes:1", workers=0)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("parts/*.json")}
    damage(output)
    corpus.preprocess(output)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("parts/*.json")}
    assert {name for name in before if before[name] != after[name]} == {redone}
    same_store(serial, output)


def test_another_plans_store_is_refused_with_the_differences(corpus: Any, serial: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(variant=Variant.DEEPSTACK_HD, data=DataConfig(images_per_part=8))
    with pytest.raises(StoreError) as caught:
        corpus.preprocess(serial, recipe=recipe)
    message = str(caught.value)
    assert "holds the store of another plan" in message
    assert "processor.layout: crops there, high_res asked for" in message
    assert "images_per_part: 4 there, 8 asked for" in message
    other = write_records(tmp_path / "other.json", [record("a", [])])
    with pytest.raises(StoreError, match=r"records.count: 15 there, 1 asked for"):
        corpus.preprocess(serial, records=other)


def test_a_folder_of_something_else_is_refused(corpus: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"not empty \(it holds thesis.tex\) and is no store of ours"):
        corpus.preprocess(tmp_path)
    with pytest.raises(StoreError, match="could not be written: Not a directory"):
        corpus.preprocess(tmp_path / "thesis.tex")


def test_the_second_job_on_a_folder_is_refused(corpus: Any, tmp_path: Path) -> None:
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    with (
        hold_lease(Location.parse(tmp_path)),
        pytest.raises(StoreError, match=rf"another preprocessing job is writing this store \({holder}\)"),
    ):
        corpus.preprocess(tmp_path)
    assert corpus.preprocess(tmp_path).samples == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_quarantined_images_stop_the_job(corpus: Any, local_ray: None, tmp_path: Path, workers: int) -> None:
    strict = tiny_recipe(data=DataConfig(images_per_part=4, max_quarantined=0.1))
    with pytest.raises(DataError) as caught:
        corpus.preprocess(tmp_path / "store", recipe=strict, workers=workers)
    message = str(caught.value)
    assert "2 of 14 images are quarantined, more than data.max_quarantined allows (0.1)" in message
    assert "photo003.jpg: not an image of a known format\n  photo009.jpg: no such file" in message
    assert len((tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(StoreError, match="has not finished"):
        Store.open(tmp_path / "store")
    assert corpus.preprocess(tmp_path / "store").images_done_before > 0


def test_text_only_records_need_no_image_folder(corpus: Any, tmp_path: Path) -> None:
    records = write_records(tmp_path / "text.json", [record(n, []) for n in range(3)])
    recipe = tiny_recipe()
    output = str(tmp_path / "store")
    run.preprocess(recipe, output, records=str(records), tokenizer=str(corpus.tokenizer), workers=0)
    store = Store.open(output)
    assert (len(store), store.num_images) == (3, 0)
    assert zarr.open_group(output, mode="r")["images/pixels"].shape == (0, 28, 28, 3)


@pytest.mark.parametrize("variant", [Variant.DEEPSTACK_HD, Variant.LLAVA])
def test_other_layouts(corpus: Any, tmp_path: Path, variant: Variant) -> None:
    corpus.preprocess(tmp_path / "store", recipe=tiny_recipe(variant=variant))
    store = Store.open(tmp_path / "store")
    image = store.image(0)
    assert image.count == (25 if variant is Variant.DEEPSTACK_HD else 1)
    assert store.read_views(0, range(image.count)).shape == (image.count, 28, 28, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"records": None},
            ConfigError,
            "data.records is not set: give JSON or JSON-lines files, or WebDataset tar shards there, or as data.re",
        ),
        ({"images": None}, ConfigError, "data.images is not set: give the folder or URL that the image paths"),
        ({"tokenizer": None}, ConfigError, "data.tokenizer is not set"),
        ({"images": "/nowhere"}, DataError, "/nowhere: no such image folder"),
        ({"records": "/nowhere.json"}, DataError, "/nowhere.json: the records cannot be read"),
    ],
)
def test_missing_inputs(
    corpus: Any, tmp_path: Path, change: dict[str, str | None], error: type[Exception], message: str
) -> None:
    inputs: dict[str, Any] = {"records": corpus.records, "images": corpus.images, "tokenizer": corpus.tokenizer}
    inputs = {name: str(value) for name, value in inputs.items()} | change
    with pytest.raises(error, match=message):
        run.preprocess(tiny_recipe(), str(tmp_path / "store"), workers=0, **inputs)
    assert not (tmp_path / "store").exists()


def test_a_vocabulary_too_small_for_the_tokenizer(corpus: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    recipe = replace(recipe, model=replace(recipe.model, language=LanguageConfig(vocab_size=300)))
    with pytest.raises(ConfigError, match=r"model.language.vocab_size is 300, .*tiny.model has 400 ids"):
        corpus.preprocess(tmp_path / "store", recipe=recipe)


def test_a_full_disk_is_named_and_the_job_goes_on_afterwards(
    corpus: Any, serial: Path, tmp_path: Path, same_store: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "store"

    def full(descriptor: int) -> None:
        if list(output.glob("images/pixels/c/2/0/0/.*.partial")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_deepstack.data.location.os.fsync", full)
    with pytest.raises(StoreError, match=r"c/2/0/0/0: could not be written: No space left on device. Nothing half-"):
        corpus.preprocess(output)
    monkeypatch.undo()
    assert corpus.preprocess(output).images_done_before == 8
    same_store(serial, output)
