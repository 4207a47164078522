"""`store merge` and `store split`: complete, verifiable stores with the same samples, no image kept twice."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store import schema
from megatron_deepstack.data.store.index import IndexReader
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import shard_path
from megatron_deepstack.data.store.writer import write_attributes
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.storekeeping.rewrite import assemble
from megatron_deepstack.storekeeping.rewrite.merge import merge
from megatron_deepstack.storekeeping.rewrite.split import split
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny_store import GRIDS, SAMPLES, write_tiny_store


def content(path: Path) -> list[tuple[object, ...]]:
    """All that a run sees of each sample, pixels included."""
    store = Store.open(path)
    samples = []
    for index in range(len(store)):
        sample = store.sample(index)
        images = [store.image(number) for number in sample.images]
        views = [store.read_views(n, range(i.count)).tobytes() for n, i in zip(sample.images, images, strict=True)]
        facts = [(image.path, image.grid, image.size, image.status) for image in images]
        samples.append((sample.id, sample.tokens.tolist(), sample.loss_mask.tolist(), facts, views))
    return samples


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def whole(path: Path) -> bool:
    assert [str(damage) for damage in verify(str(path), processes=1)] == []
    assert zarr.open_group(path, mode="r").attrs["complete"] is True
    return True


@pytest.fixture(params=list(Compression))
def three(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Two different stores, and one with images of the first (the same seed) under other names."""
    return [
        write_tiny_store(tmp_path / "a", seed=1, name="a", compression=request.param),
        write_tiny_store(
            tmp_path / "b", seed=2, name="b", compression=request.param, grids=GRIDS[:5], samples=SAMPLES[:4]
        ),
        write_tiny_store(tmp_path / "c", seed=1, name="c", compression=request.param, samples=((0, 8), (5,))),
    ]


def test_a_merged_store_has_all_samples_in_order(three: list[Path], tmp_path: Path) -> None:
    done = merge(tmp_path / "out", three[:2])
    assert whole(tmp_path / "out")
    assert content(tmp_path / "out") == content(three[0]) + content(three[1])
    assert (done.samples, done.images, done.shared, done.shards, done.whole) == (16, 14, 0, 5, 5)
    first = Store.open(three[0]).attributes
    merged = Store.open(tmp_path / "out").attributes
    assert (merged.processor, merged.tokenizer) == (first.processor, first.tokenizer)
    assert merged.plan_hash not in {first.plan_hash, Store.open(three[1]).attributes.plan_hash}


def test_shards_are_linked_not_copied(three: list[Path], tmp_path: Path) -> None:
    merge(tmp_path / "out", three[:2])
    for number, (source, part) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        assert os.path.samefile(tmp_path / "out" / shard_path(number), three[source] / shard_path(part))


def test_without_hard_links_they_are_copied(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(tmp_path / "linked", three[:2])

    def refuse(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(assemble.os, "link", refuse)
    merge(tmp_path / "copied", three[:2])
    assert not os.path.samefile(tmp_path / "copied" / shard_path(0), three[0] / shard_path(0))
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")


def test_images_of_several_stores_are_kept_once(three: list[Path], tmp_path: Path) -> None:
    done = merge(tmp_path / "out", [three[0], three[2]])
    assert whole(tmp_path / "out")
    assert done.shared == 8, "every stored image"
    got, expected = content(tmp_path / "out"), content(three[0]) + content(three[2])
    assert [sample[:3] + sample[4:] for sample in got] == [sample[:3] + sample[4:] for sample in expected]
    assert Store.open(tmp_path / "out").attributes.counts["views"] == Store.open(three[0]).attributes.counts["views"]


def test_parts_of_other_lengths(three: list[Path], tmp_path: Path) -> None:
    packed = Store.open(three[0]).pixels.compression
    short = write_tiny_store(tmp_path / "short", seed=5, name="s", images_per_part=2, compression=packed)
    merge(tmp_path / "out", [short, three[1]])
    assert whole(tmp_path / "out")
    assert content(tmp_path / "out") == content(short) + content(three[1])


@pytest.mark.parametrize("layout", [ViewLayout.HIGH_RES, ViewLayout.GLOBAL])
def test_other_layouts(tmp_path: Path, layout: ViewLayout) -> None:
    grids = ((2, 2), (1, 2), (1, 3)) if layout is ViewLayout.HIGH_RES else ((1, 1),) * 3
    paths = [
        write_tiny_store(tmp_path / str(n), seed=n, layout=layout, grids=grids, samples=((0,), (2, 1), (), (1,)))
        for n in range(2)
    ]
    merge(tmp_path / "out", paths)
    split(tmp_path / "out", tmp_path / "train", tmp_path / "held", count=3, seed=0)
    assert all(whole(tmp_path / name) for name in ("out", "train", "held"))


def test_text_alone(tmp_path: Path) -> None:
    paths = [write_tiny_store(tmp_path / str(n), seed=n, grids=(), samples=((), ())) for n in range(2)]
    merge(tmp_path / "out", paths)
    split(tmp_path / "out", tmp_path / "train", tmp_path / "held", count=1, seed=0)
    assert all(whole(tmp_path / name) for name in ("out", "train", "held"))
    assert content(tmp_path / "out") == content(paths[0]) + content(paths[1])


@pytest.mark.parametrize("count", [1, 5, 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_store(three: list[Path], tmp_path: Path, count: int, seed: int) -> None:
    done = split(three[0], tmp_path / "train", tmp_path / "held", count=count, seed=seed)
    assert whole(tmp_path / "train")
    assert whole(tmp_path / "held")
    train, held, both = content(tmp_path / "train"), content(tmp_path / "held"), content(three[0])
    assert (len(train), len(held)) == (done.train_samples, done.heldout_samples) == (12 - count, count)
    assert [sample for sample in both if sample in held] == held
    assert [sample for sample in both if sample in train] == train
    assert len(train) + len(held) == len(both)
    for path, images in ((tmp_path / "train", done.train_images), (tmp_path / "held", done.heldout_images)):
        store = Store.open(path)
        used = {image for index in range(len(store)) for image in store.sample_images(index)}
        assert used == set(range(store.num_images)), "no image that nobody uses"
        assert store.num_images == images


def test_another_seed_draws_others(three: list[Path], tmp_path: Path) -> None:
    drawn = []
    for seed in range(3):
        split(three[0], tmp_path / f"t{seed}", tmp_path / f"h{seed}", count=4, seed=seed)
        drawn.append(tuple(sample[0] for sample in content(tmp_path / f"h{seed}")))
    assert len(set(drawn)) == 3


def test_bytes_depend_on_the_sources_alone(three: list[Path], tmp_path: Path) -> None:
    for run in ("x", "y"):
        merge(tmp_path / run / "out", three)
        split(tmp_path / run / "out", tmp_path / run / "t", tmp_path / run / "h", count=6, seed=3)
    assert tree(tmp_path / "x") == tree(tmp_path / "y")


def merge_and_split(folder: Path) -> list[tuple[object, dict[str, list[int]]]]:
    """All that comes out, from stores of parts of other lengths: shards are linked, and gathered from both."""
    paths = [
        write_tiny_store(folder / name, seed=n, name=name, images_per_part=length)
        for n, (name, length) in enumerate({"a": 4, "b": 2}.items())
    ]
    merge(folder / "out", paths)
    split(folder / "out", folder / "train", folder / "held", count=9, seed=3)
    outputs = [folder / name for name in ("out", "train", "held")]
    assert all(whole(path) for path in outputs)
    return [
        (content(path), {name: Store.open(path).array(name).tolist() for name in schema.index_names(schema.VERSION)})
        for path in outputs
    ]


@pytest.mark.slow
def test_index_arrays_of_several_chunks_come_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge_and_split(tmp_path / "whole")
    monkeypatch.setattr(schema, "INDEX_ROWS_PER_CHUNK", 5)
    assert merge_and_split(tmp_path / "chunks") == expected
    assert (tmp_path / "chunks/out/images/start/c/3").exists()


def test_index_rows_are_read_about_once_however_many_shards_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as large a store, twice as many rows: an array that is read anew for each shard would be four times."""
    counted = 0

    def counting(read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def spy(*arguments: Any) -> np.ndarray:
            nonlocal counted
            rows = read(*arguments)
            counted += rows.size
            return rows

        return spy

    for name in ("__getitem__", "take"):
        monkeypatch.setattr(IndexReader, name, counting(getattr(IndexReader, name)))
    sums = []
    for times in (8, 16):
        stores = [
            write_tiny_store(
                tmp_path / f"{times}-{seed}",
                seed=seed,
                grids=((2, 2),) * times,
                samples=((0,),),
                images_per_part=2 - seed,
            )
            for seed in range(2)
        ]
        counted = 0
        merge(tmp_path / f"out{times}", stores)
        sums.append(counted)
    assert 0 < sums[1] < 2.1 * sums[0]


def change(path: Path, **changes: object) -> None:
    attributes = Store.open(path).attributes
    write_attributes(path, {name: getattr(attributes, name) for name in attributes.__dataclass_fields__} | changes)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda path: change(path, tokenizer={**Store.open(path).attributes.tokenizer, "sha256": "9" * 64}),
            r"a and .*b were made differently .*\n  tokenizer.sha256: 1{64} in .*a, 9{64} in .*b\n.*data.stores mixes",
        ),
        (
            lambda path: change(path, processor={**Store.open(path).attributes.processor, "num_crops": 5}),
            r"processor.num_crops: 4 in .*a, 5 in .*b",
        ),
        (lambda path: change(path, complete=False), "b: preprocessing of this store has not finished"),
        (lambda path: (path / shard_path(1)).unlink(), "c/1/0/0/0: the shard is missing.*store verify"),
    ],
)
def test_what_cannot_be_merged(tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    paths = [write_tiny_store(tmp_path / name, name=name, seed=n) for n, name in enumerate("ab")]
    fault(paths[1])
    with pytest.raises(StoreError, match=message):
        merge(tmp_path / "out", paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "nothing is left behind"


def test_compressed_and_uncompressed_are_not_mixed(tmp_path: Path) -> None:
    paths = [write_tiny_store(tmp_path / str(c), compression=c) for c in Compression]
    with pytest.raises(StoreError, match=r"compression: none in .*none, zstd in .*zstd"):
        merge(tmp_path / "out", paths)


def test_outputs_that_exist_are_refused(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="out: exists already; give another folder"):
        merge(tmp_path / "out", three[:2])
    with pytest.raises(StoreError, match="out: exists already"):
        split(three[0], tmp_path / "train", tmp_path / "out", count=2, seed=0)
    assert not (tmp_path / "train").exists()
    with pytest.raises(StoreError, match="given for both sides"):
        split(three[0], tmp_path / "x", tmp_path / "x", count=2, seed=0)


@pytest.mark.parametrize("count", [0, 12, 99])
def test_each_side_needs_a_sample(three: list[Path], tmp_path: Path, count: int) -> None:
    with pytest.raises(StoreError, match=f"{count} of its 12 samples cannot be held out"):
        split(three[0], tmp_path / "t", tmp_path / "h", count=count, seed=0)


def test_what_a_killed_run_left_is_cleared_and_one_that_runs_is_not(three: list[Path], tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial" / "images" / "torn"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"torn")
    with assemble.building(tmp_path / "out") as draft:
        assert not leftover.exists()
        draft.mkdir()
        with pytest.raises(StoreError, match="another process is writing this store"):
            merge(tmp_path / "out", three[:2])
    shutil.rmtree(tmp_path / "out")
    merge(tmp_path / "out", three[:2])
    assert whole(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assemble, "write_json", full)
    with pytest.raises(StoreError, match="out: could not be written: No space left on device"):
        merge(tmp_path / "out", three[:2])
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))


def test_a_source_that_cannot_be_read_is_named_and_not_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_tiny_store(tmp_path / name, name=name, seed=n) for n, name in enumerate("ab")]

    class BadDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    def open_badly(path: Path, mode: str) -> IO[bytes]:
        return BadDisk() if mode == "rb" else open(path, mode)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as broken:
        broken.setattr(assemble.os, "link", refuse)
        broken.setattr(assemble, "open", open_badly, raising=False)
        with pytest.raises(
            StoreError, match=f"^{paths[0] / shard_path(0)}: cannot be read: Input/output error.*verify"
        ):
            merge(tmp_path / "out", paths)
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", refuse)
        with pytest.raises(StoreError, match=f"^{paths[0]}.*: the shard cannot be read: Invalid cross-device"):
            split(paths[0], tmp_path / "t", tmp_path / "h", count=3, seed=0)
    (paths[0] / "quarantine.jsonl").write_text("{}\n")
    store = Store.open(paths[0])
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match=f"^{paths[0]}/quarantine.jsonl: cannot be read: Invalid cross-device"):
        assemble.quarantine_lines(store)


def test_its_plan_is_that_of_the_merge(three: list[Path], tmp_path: Path) -> None:
    """So that `preprocess` into it is refused as into any other plan's store."""
    merge(tmp_path / "out", three[:2])
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["plan_hash"] == Store.open(tmp_path / "out").plan_hash
    assert plan["description"] == {"merge": [Store.open(path).plan_hash for path in three[:2]]}


def test_the_verbs(three: list[Path], tmp_path: Path) -> None:
    out, train, held = (str(tmp_path / name) for name in ("out", "train", "held"))
    result = CliRunner().invoke(app, ["store", "merge", out, *map(str, three)])
    assert result.exit_code == 0, result.output
    assert "18 samples, 15 images (8 of several stores" in result.output
    result = CliRunner().invoke(app, ["store", "split", out, train, held, "--fraction", "0.25", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert len(Store.open(held)) == 4  # 0.25 of 18, rounded
    assert len(Store.open(train)) == 14
    np.testing.assert_equal(CliRunner().invoke(app, ["store", "merge", out, *map(str, three)]).exit_code, 4)
    for wrong in ([], ["--fraction", "0.5", "--count", "3"]):
        result = CliRunner().invoke(app, ["store", "split", out, train, held, *wrong])
        assert (result.exit_code, "give one of --fraction and --count" in result.output) == (2, True)


@pytest.mark.parametrize(
    "verb",
    [
        ("merge", "OUT", "s3://bucket/a.zarr", "b"),
        ("merge", "s3://bucket/out.zarr", "a", "b"),
        ("split", "s3://bucket/a.zarr", "t", "h", "--count", "1"),
        ("split", "a", "t", "s3://bucket/h.zarr", "--count", "1"),
    ],
)
def test_the_verbs_refuse_urls(three: list[Path], monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]) -> None:
    monkeypatch.chdir(three[0].parent)
    before = sorted(os.listdir())
    result = CliRunner().invoke(app, ["store", *verb])
    assert result.exit_code == 4
    (url,) = (word for word in verb if "://" in word)
    assert f"{url}: stores are merged and split in folders" in result.output
    assert sorted(os.listdir()) == before
