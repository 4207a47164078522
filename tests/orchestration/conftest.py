"""One local Ray for all tests here, and a corpus to preprocess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from preprocess_jobs import RECIPE, Work

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.testing.tiny import tiny_recipe as tiny_model_recipe
from megatron_deepstack.testing.tiny_data import (
    jpeg_bytes,
    record,
    tiny_recipe,
    write_photos,
    write_records,
    write_tokenizer,
)
from orchestration.cluster import ray_session
from orchestration.preprocess.driver.run import preprocess
from orchestration.preprocess.driver.summary import Summary
from orchestration.preprocess.driver.tasks import WORKER_ENVIRONMENT


@dataclass(frozen=True)
class Corpus:
    """Files for a job, and the job."""

    records: Path
    images: Path
    tokenizer: Path

    def preprocess(
        self, output: Path | str, *, workers: int = 0, recipe: Recipe | None = None, records: Path | None = None
    ) -> Summary:
        return preprocess(
            recipe or tiny_recipe(),
            str(output),
            records=str(records or self.records),
            images=str(self.images),
            tokenizer=str(self.tokenizer),
            workers=workers,
        )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """15 records of 14 images: shared images, several in one record, text only, two broken files, a damaged one."""
    folder = tmp_path_factory.mktemp("corpus")
    photos = write_photos(folder / "photos", 14)
    (folder / "photos" / photos[3]).write_bytes(b"no image at all")
    (folder / "photos" / photos[5]).write_bytes(damaged_jpeg())
    (folder / "photos" / photos[9]).unlink()
    records = [record(f"r{number}", [name], answer=f"Photo {number}.") for number, name in enumerate(photos[:10])]
    records += [record("again", [f"./{photos[0]}"]), record("two", photos[10:12]), record("text", [])]
    records += [record("two, one broken", [photos[12], photos[3]]), record("last", [photos[13]])]
    return Corpus(
        write_records(folder / "records.json", records), folder / "photos", write_tokenizer(folder / "tiny.model")
    )


@pytest.fixture(scope="session")
def serial(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the corpus, made in one process."""
    output = tmp_path_factory.mktemp("serial") / "store"
    corpus.preprocess(output)
    return output


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """64 large photos in 16 parts, and the store that one undisturbed process makes."""
    folder = tmp_path_factory.mktemp("heavy")
    (folder / "photos").mkdir()
    names = [f"photo{number:03d}.jpg" for number in range(64)]
    for number, name in enumerate(names):
        (folder / "photos" / name).write_bytes(jpeg_bytes(1600, 1200, seed=number % 4, quality=80 + number % 5))
    write_records(folder / "records.json", [record(name, [name]) for name in names])
    write_tokenizer(folder / "tiny.model")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    preprocess(load_recipe(str(recipe), ()), str(folder / "serial"), workers=0)
    return Work(recipe, folder / "serial", 17)


@pytest.fixture(scope="session")
def local_ray(s3_server: str) -> Iterator[None]:
    """Ray with two workers, which know the S3 server from their environment."""
    with ray_session(2, None, WORKER_ENVIRONMENT):
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe of two stages to launch, whose store and tokenizer are nowhere."""
    recipe = tiny_model_recipe(parallel=ParallelConfig(pipeline=2))
    return replace(recipe, run_dir=str(tmp_path / "run"), data=replace(recipe.data, store="/s", tokenizer="/t"))


def damaged_jpeg() -> bytes:
    """A JPEG with one wrong byte that Pillow decodes without a word."""
    data = jpeg_bytes(300, 200, seed=0, restart_marker_rows=1)
    for position in range(len(data) // 4, len(data)):
        damaged = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        with suppress(QuarantineError):
            if decode_image(damaged, 10**6).damage is not None:
                return damaged
    raise AssertionError("no byte does it")


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path, but for what tells of the run: the lock and the report."""
    files = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in (".lock", "report.json")}


@pytest.fixture
def same_store() -> object:
    """Assertion that two stores are the same, byte for byte."""

    def check(first: Path, second: Path) -> None:
        one, two = contents(first), contents(second)
        assert sorted(one) == sorted(two)
        assert [name for name in one if one[name] != two[name]] == []

    return check
