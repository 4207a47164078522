"""The job over tar shards, over images and records at URLs, and with a chat template: the same store as from files."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.config.choices import Orientation
from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.data.images import source as image_source
from megatron_deepstack.data.images.decoder import shared_decoder
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError, LocationError, StoreError
from megatron_deepstack.inference.questions import read_question
from megatron_deepstack.testing.tiny_chat import QWEN_CONFIG, QWEN_TOKENS, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import tiny_recipe
from orchestration.preprocess.driver.run import preprocess


@pytest.fixture(autouse=True)
def new_decoder() -> None:
    """A decoder process that knows the environment of its test: the server's address is in it."""
    shared_decoder.cache_clear()


def views_by_id(root: str | Path) -> dict[str, list[np.ndarray]]:
    store = Store.open(str(root))
    samples = [store.sample(number) for number in range(len(store))]
    return {
        sample.id: [store.read_views(image, range(store.image(image).count)) for image in sample.images]
        for sample in samples
    }


def same_views(first: str | Path, second: str | Path) -> None:
    one, two = views_by_id(first), views_by_id(second)
    assert list(one) == list(two)
    for identifier, views in one.items():
        assert len(views) == len(two[identifier])
        for mine, other in zip(views, two[identifier], strict=True):
            np.testing.assert_array_equal(mine, other)


def write_shards(corpus: Any, folder: Path) -> list[Path]:
    """The corpus as two shards, with the records in the order that they have there; missing images are left out."""
    records = json.loads(corpus.records.read_text())
    folder.mkdir()
    paths = []
    for number in range(2):
        path = folder / f"shard-{number:02d}.tar"
        paths.append(path)
        with tarfile.open(path, "w") as tar:
            for place, item in enumerate(records[number * 8 : (number + 1) * 8]):
                images = item.get("image", [])
                names = [images] if isinstance(images, str) else images
                members = [(f"{number}{place:03d}.json", json.dumps(item).encode())]
                for index, name in enumerate(names):
                    file = corpus.images / name
                    content = file.read_bytes() if file.exists() else b""
                    members.append((f"{number}{place:03d}.{index}.jpg", content))
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return paths


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_tar_shards(corpus: Any, serial: Path, local_ray: None, tmp_path: Path, workers: int) -> None:
    write_shards(corpus, tmp_path / "shards")
    summary = preprocess(
        tiny_recipe(),
        str(tmp_path / "store"),
        records=f"{tmp_path}/shards/shard-{{00..01}}.tar",
        tokenizer=str(corpus.tokenizer),
        workers=workers,
    )
    assert (summary.samples, summary.dropped, summary.quarantined) == (12, 3, 3)
    same_views(serial, tmp_path / "store")
    assert Store.open(tmp_path / "store").image(0).path == "shard-00.tar/0000.0.jpg"


def test_changed_shards_are_another_plan(corpus: Any, tmp_path: Path) -> None:
    first, _ = write_shards(corpus, tmp_path / "shards")
    job: dict[str, Any] = {"records": f"{tmp_path}/shards/*.tar", "tokenizer": str(corpus.tokenizer), "workers": 0}
    preprocess(tiny_recipe(), str(tmp_path / "store"), **job)
    first.write_bytes(first.read_bytes().replace(b"Photo 1.", b"Photo X."))
    with pytest.raises(StoreError, match=r"records\.sha256"):
        preprocess(tiny_recipe(), str(tmp_path / "store"), **job)


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with Location.parse(url).child(str(path.relative_to(folder))).write() as file:
                file.write(path.read_bytes())


def test_images_and_records_of_a_bucket(
    corpus: Any,
    serial: Path,
    local_ray: None,
    tmp_path: Path,
    bucket: str,
    same_store: Any,
) -> None:
    upload(corpus.images, f"{bucket}/photos")
    upload(corpus.records.parent, f"{bucket}/records")
    for workers in (0, 2):
        output = tmp_path / str(workers)
        preprocess(
            tiny_recipe(),
            str(output),
            records=f"{bucket}/records/rec*.json",
            images=f"{bucket}/photos",
            tokenizer=str(corpus.tokenizer),
            workers=workers,
        )
        same_views(serial, output)
        lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
        assert {"kind": "image quarantined", "path": "photo009.jpg", "reason": "no such object"} in lines


def test_shards_of_a_bucket(corpus: Any, serial: Path, tmp_path: Path, bucket: str) -> None:
    write_shards(corpus, tmp_path / "shards")
    upload(tmp_path / "shards", f"{bucket}/shards")
    preprocess(
        tiny_recipe(),
        str(tmp_path / "store"),
        records=f"{bucket}/shards/*.tar",
        tokenizer=str(corpus.tokenizer),
        workers=0,
    )
    same_views(serial, tmp_path / "store")


LOSING = """
import os
import s3fs
from megatron_deepstack.data.images import decoder_process, source as image_source
image_source._PAUSES = ()
read = decoder_process.read_image
def lose(image, max_pixels):
    if "6." in image.name:
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        s3fs.S3FileSystem.clear_instance_cache()
    return read(image, max_pixels)
decoder_process.read_image = lose
decoder_process.main()
"""
"""A decoder process that loses its bucket at the image of that number."""


def test_a_lost_connection_stops_the_job_and_it_goes_on_later(
    corpus: Any,
    serial: Path,
    tmp_path: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is quarantined that could be read; what was done is kept."""
    upload(corpus.images, f"{bucket}/photos")
    job: dict[str, Any] = {"records": str(corpus.records), "images": f"{bucket}/photos", "workers": 0}
    job |= {"tokenizer": str(corpus.tokenizer)}
    recipe = replace(tiny_recipe(), data=DataConfig(images_per_part=4, max_quarantined=0.5, max_image_seconds=10))
    monkeypatch.setattr("megatron_deepstack.data.images.decoder._CODE", LOSING)
    with pytest.raises(LocationError, match=r"s3://.*photo\d+.jpg: .*run the same command again"):
        preprocess(recipe, str(tmp_path / "store"), **job)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has not finished"):
        Store.open(tmp_path / "store")
    summary = preprocess(recipe, str(tmp_path / "store"), **job)
    assert summary.quarantined == 2
    assert summary.parts_done_before >= 1
    same_views(serial, tmp_path / "store")


def test_a_failed_request_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def flaky(location: Location, first: int = 0, length: int | None = None) -> bytes:
        calls.append(first)
        if len(calls) < 3:
            raise LocationError("lost")
        return b"image"

    monkeypatch.setattr(image_source, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Location, "size", lambda location: 5)
    monkeypatch.setattr(Location, "read_bytes", flaky)
    assert image_source.read_image(Location("s3://bucket/a.jpg"), 100) == b"image"
    assert len(calls) == 3, "the fault did not fire"
    calls.clear()
    monkeypatch.setattr(image_source, "_PAUSES", (0.0,))
    with pytest.raises(LocationError, match="lost"):
        image_source.read_image(Location("s3://bucket/a.jpg"), 100)


def test_no_permission_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(location: Location) -> int:
        raise PermissionError(13, "Forbidden")

    monkeypatch.setattr(Location, "size", forbidden)
    with pytest.raises(DataError, match=r"s3://bucket/a.jpg: reading failed: Forbidden"):
        image_source.read_image(Location("s3://bucket/a.jpg"), 100)


def test_a_chat_template_with_a_hugging_face_tokenizer(corpus: Any, tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "qwen", QWEN_TOKENS, QWEN_CONFIG)
    data = DataConfig(images_per_part=4, max_quarantined=0.5, template="qwen", orientation=Orientation.EXIF)
    preprocess(
        tiny_recipe(data=data),
        str(tmp_path / "store"),
        records=str(corpus.records),
        images=str(corpus.images),
        tokenizer=str(folder),
        workers=0,
    )
    store = Store.open(tmp_path / "store")
    assert store.attributes.processor["orientation"] == "exif"
    assert store.attributes.tokenizer["template"] == "qwen"
    question = read_question(store, 1, load_tokenizer(folder))
    assert (question.text, question.expected) == ("What is it?", "Photo 1.")
