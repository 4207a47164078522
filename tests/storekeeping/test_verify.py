"""`store verify` finds every fault, names it, and finds nothing where there is none."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store import schema
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import INDEX_ARRAYS, index_chunk_path, shard_path
from megatron_deepstack.data.store.writer import write_attributes
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny_store import write_tiny_store

VIEW_BYTES = 16 * 16 * 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_store(tmp_path / "store")


def found(root: Path) -> list[str]:
    return [str(damage) for damage in verify(str(root), processes=1)]


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("layout", ViewLayout)
def test_a_whole_store_has_no_fault(tmp_path: Path, compression: Compression, layout: ViewLayout) -> None:
    grids = ((1, 1), (1, 1)) if layout is ViewLayout.GLOBAL else ((2, 2), (1, 3), None, (4, 1), (2, 1))
    path = write_tiny_store(tmp_path / "x", compression=compression, layout=layout, grids=grids, samples=((0, 1), ()))
    assert found(path) == []


def test_a_store_without_images_or_samples(tmp_path: Path) -> None:
    assert found(write_tiny_store(tmp_path / "text", grids=(), samples=((), ()))) == []
    assert found(write_tiny_store(tmp_path / "none", grids=(), samples=())) == []


def change_index(name: str, change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        array = INDEX_ARRAYS[name]
        path = root / index_chunk_path(array, 0)
        values = np.fromfile(path, array.dtype).reshape(-1, *array.row_shape)
        before = values.copy()
        change(values)
        assert (values != before).any(), "the fault did not take"
        values.tofile(path)

    return fault


def put(place: int, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


def change_shard(change: Callable[[bytearray], object], part: int = 1) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        path = root / shard_path(part)
        data = bytearray(path.read_bytes())
        before = bytes(data)
        change(data)
        assert data != before, "the fault did not take"
        path.write_bytes(data)

    return fault


def flip(data: bytearray) -> None:
    data[4 * VIEW_BYTES + 3] ^= 1


def change_counts(root: Path) -> None:
    attributes = Store.open(root).attributes
    fields = {name: getattr(attributes, name) for name in attributes.__dataclass_fields__}
    write_attributes(root, {**fields, "counts": {**attributes.counts, "views": 99, "tokens": 98}})


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (change_shard(flip), [r"c/1/0/0/0: view 1 of image 5 \('tiny/5.jpg'\) is damaged: its crc32c is .* was writ"]),
        (change_shard(lambda data: data.pop()), [r"c/1/0/0/0: its index, the last \d+ of \d+ bytes, is damaged"]),
        (change_shard(lambda data: data.clear()), ["c/1/0/0/0: its index, the last .* is damaged or cut off"]),
        (
            change_shard(lambda data: data.insert(0, 1)),
            ["do not fill", *["view . of image .* is damaged"] * 17],
        ),
        (lambda root: (root / shard_path(1)).unlink(), ["c/1/0/0/0: cannot be read: No such file"]),
        (
            lambda root: (root / shard_path(2)).rename(root / shard_path(1)),
            ["slots .*: never written", *["view . of image [4567]"] * 5, "c/2/0/0/0: cannot be read"],
        ),
        (
            lambda root: (root / shard_path(1)).with_name("1").write_bytes(b""),
            ["c/1/0/0/1: is no shard of this store; delete it"],
        ),
        (change_index("images/crc32c", put(0, 7)), [r"view 0 of image 0 .* its crc32c is .*, 00000007 was written"]),
        (change_index("samples/tokens", put(0, 61)), ["samples/tokens: sample 0: ids outside 0 to 60"]),
        (change_index("samples/tokens", put(0, -3)), ["samples/tokens: sample 0: ids outside 0 to 60"]),
        (
            change_index("samples/tokens", put(0, -200)),
            ["samples/images: sample 0: as many images as placeholders were expected"],
        ),
        (change_index("samples/loss_mask", put(0, 2)), ["loss_mask: sample 0: values other than 0 and 1"]),
        (
            change_index("samples/loss_mask", put(1, 1)),
            ["sample 0: image placeholders that are to be learned", "counts.target_tokens is"],
        ),
        (change_index("samples/images", put(0, 9)), ["samples/images: sample 0: images outside 0 to 8"]),
        (change_index("samples/images", put(0, -1)), ["samples/images: sample 0: images outside 0 to 8"]),
        (change_index("samples/images", put(0, 3)), ["sample 0: images that are quarantined and have no views"]),
        (change_index("samples/tokens_offsets", put(0, 1)), ["samples/tokens_offsets: begins with 1, expected 0"]),
        (change_index("samples/tokens_offsets", put(1, 10**6)), ["tokens_offsets: falls after sample 1, where it may"]),
        (change_index("samples/id", put(0, 255)), ["samples/id: sample 0: not UTF-8"]),
        (change_index("images/path", put(0, 255)), ["images/path: image 0: not UTF-8"]),
        (
            change_index("images/status", put(0, 9)),
            [r"images/status: image 0: not one of \[0, 1, 2\]"],
        ),
        (
            change_index("images/status", put(0, 2)),
            ["samples 0, 4: images that are quarantined", "image 0: quarantined, and yet", "counts.quarantined is 1"],
        ),
        (change_index("images/grid", put(0, 7)), ["images/grid: image 0: no grid of this processor"]),
        (change_index("images/grid", put(0, 1)), ["images/grid: image 0: no grid of this processor"]),
        (
            change_index("images/count", put(4, 2)),
            ["image 4: a 2 x 1 grid has 3 views, found 2", "image 5: does not foll"],
        ),
        (change_index("images/start", put(0, 10**6)), ["images/start: image 0: views beyond one shard"]),
        (change_index("images/start", put(8, 41)), ["images/start: image 8: does not follow the image before it"]),
        (change_counts, ["zarr.json: counts.views is 99, the arrays have", "zarr.json: counts.tokens is 98"]),
    ],
)
def test_every_fault_is_found(root: Path, fault: Callable[[Path], object], messages: list[str]) -> None:
    assert found(root) == []
    fault(root)
    lines = found(root)
    for message in messages:
        line = next((line for line in lines if re.search(message, line)), None)
        assert line is not None, (message, lines)
        lines.remove(line)


def swap(values: np.ndarray) -> None:
    values[[1, 2]] = values[[2, 1]]


@pytest.mark.parametrize("images_per_part", [1, 4])
def test_an_index_of_several_chunks_has_the_same_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_per_part: int
) -> None:
    lines = []
    for rows in (1 << 24, 7):
        monkeypatch.setattr(schema, "INDEX_ROWS_PER_CHUNK", rows)
        root = write_tiny_store(tmp_path / str(rows), images_per_part=images_per_part)
        assert (root / "images/start/c/1").exists() == (rows == 7)
        assert found(root) == []
        change_shard(flip, part=0)(root)
        change_index("images/start", swap)(root)
        lines.append(found(root))
    assert lines[0] == lines[1]
    assert any("is damaged: its crc32c" in line for line in lines[0])


def test_whole_index_arrays_are_read_as_often_for_many_shards_as_for_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    whole = Store.array
    monkeypatch.setattr(Store, "array", lambda store, name: names.append(name) or whole(store, name))
    read = []
    for images_per_part in (9, 1):
        root = write_tiny_store(tmp_path / str(images_per_part), images_per_part=images_per_part)
        names.clear()
        assert found(root) == []
        read.append(list(names))
    assert read[0] == read[1] != []


def test_damage_in_many_shards_is_listed_in_order_and_by_several_processes(root: Path) -> None:
    for part in range(3):
        change_shard(lambda data: data.__setitem__(0, data[0] ^ 1), part)(root)
    progress: list[tuple[int, int]] = []
    lines = [str(damage) for damage in verify(str(root), processes=2, progress=lambda *at: progress.append(at))]
    assert [line.split(":")[0] for line in lines] == [shard_path(part) for part in range(3)]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert all("restore the file from a copy" in line for line in lines)


def test_compressed_damage(tmp_path: Path) -> None:
    root = write_tiny_store(tmp_path / "packed", compression=Compression.ZSTD)
    change_shard(lambda data: data.__setitem__(12, 1), 0)(root)
    (line,) = found(root)
    assert "view 0 of image 0 ('tiny/0.jpg') is damaged: its header promises" in line


class FailingFile(io.BytesIO):
    """A file on a disk with one bad block."""

    bad = 4 * VIEW_BYTES

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() == self.bad:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_a_block_that_cannot_be_read_is_one_fault_among_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_shard(lambda data: data.__setitem__(0, data[0] ^ 1), part=1)(root)
    change_shard(lambda data: data.__setitem__(0, data[0] ^ 1), part=2)(root)
    opened = Location.open_read

    def open_read(location: Location) -> IO[bytes]:
        if str(location).endswith(shard_path(0)):
            raise OSError(116, "Stale file handle")
        return FailingFile(location.read_bytes()) if str(location).endswith(shard_path(1)) else opened(location)

    monkeypatch.setattr(Location, "open_read", open_read)
    for line, message in zip(
        found(root),
        (
            "c/0/0/0/0: cannot be read: Stale file handle",
            r"c/1/0/0/0: view 0 of image 4 \('tiny/4.jpg'\) is damaged: its crc32c",
            r"c/1/0/0/0: view 1 of image 5 \('tiny/5.jpg'\) cannot be read: Input/output error",
            r"c/2/0/0/0: view 0 of image 8 \('tiny/8.jpg'\) is damaged: its crc32c",
        ),
        strict=True,
    ):
        assert re.search(message, line), line


def test_an_unfinished_store_is_an_error_of_its_own(root: Path) -> None:
    attributes = Store.open(root).attributes
    write_attributes(
        root, {name: getattr(attributes, name) for name in attributes.__dataclass_fields__} | {"complete": False}
    )
    with pytest.raises(StoreError, match="has not finished"):
        verify(str(root))


def test_a_store_in_a_bucket(root: Path, bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem().put(f"{root}/", f"{bucket}/x/", recursive=True)
    assert [str(damage) for damage in verify(f"{bucket}/x", processes=1)] == []
    s3fs.S3FileSystem().rm(f"{bucket}/x/{shard_path(2)}")
    (line,) = [str(damage) for damage in verify(f"{bucket}/x", processes=1)]
    assert "c/2/0/0/0: cannot be read" in line


def test_the_verb(root: Path) -> None:
    result = CliRunner().invoke(app, ["store", "verify", str(root), "--processes", "1"])
    assert (result.exit_code, "whole; every checksum" in result.output) == (0, True)
    change_shard(flip)(root)
    result = CliRunner().invoke(app, ["store", "verify", str(root), "--processes", "1"])
    assert result.exit_code == 4
    assert "view 1 of image 5" in result.output
    assert "1 fault, listed above" in result.output
