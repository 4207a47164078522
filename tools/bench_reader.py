"""Random single-sample reads of a store, against zarr-python and mosaicml-streaming's MDS on the same samples.

There are three cases: views of one size, the same compressed, and views of many sizes (pictures from 200x150 to
4000x3000 pixels at their own resolution). In the first two a sample is a global view and its four crops, 1.7 MB; in the
third it is one view, 5.6 MB on average. The page cache is warm, one core works. Rounds alternate between the readers in
one process, and ratios are the median over rounds. zarr-python reads a sample's chunks as one slice, its fastest way
(its speed view by view is printed too). What writing either kind of store costs the CPU is printed too. MDS checks
nothing, so it meets our unchecked reader; it needs
`pip install --no-deps mosaicml-streaming xxhash zstd python-snappy cramjam brotli catalogue` and is left out (null)
where that is missing. The last line is one JSON object. Run on an otherwise idle machine: python tools/bench_reader.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store import schema
from megatron_deepstack.data.store.blocks import as_blocks, from_blocks
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import BlockSlots, PixelsShape, num_blocks
from megatron_deepstack.data.store.shard_writer import open_shard
from megatron_deepstack.data.store.writer import IndexWriters, open_index, write_skeleton
from megatron_deepstack.planning.views import smart_resize

VIEWS = 5
IMAGES_PER_PART = 64
MIXED_PER_PART = 20
Read = Callable[[int], np.ndarray]


def pictures(number: int) -> np.ndarray:
    """Views of a smooth picture with noise, uint8 (5, 336, 336, 3), drawn from the number."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 240, (VIEWS, 8, 8, 3)).repeat(42, axis=1).repeat(42, axis=2)
    return (coarse + generator.integers(0, 16, coarse.shape)).astype(np.uint8)


def write_store(root: Path, images: int, compression: Compression) -> float:
    """A store of `images` samples, each with an image of its own; returns the CPU seconds of its shards per GiB."""
    parts = -(-images // IMAGES_PER_PART)
    shape = PixelsShape(parts, IMAGES_PER_PART * VIEWS, 336, compression)
    sums, took = np.zeros((parts, shape.slots_per_part), np.uint32), 0.0
    for part in range(parts):
        numbers = range(part * IMAGES_PER_PART, min((part + 1) * IMAGES_PER_PART, images))
        drawn = [pictures(number) for number in numbers]
        begin = time.process_time()
        with open_shard(root, part, shape) as shard:
            for place, views in enumerate(drawn):
                sums[part, place * VIEWS : (place + 1) * VIEWS] = checksums(views)
                shard.append(views)
        took += time.process_time() - begin
    with open_index(root) as index:
        index.append("images/start", np.arange(images) * VIEWS)
        index.append("images/count", [VIEWS] * images)
        index.append("images/grid", [[2, 2]] * images)
        index.append("images/size", [[672, 672]] * images)
        write_rest(index, images, sums)
    write_skeleton(root, shape, attributes(images, schema.VERSION, {}))
    return took / (images * VIEWS * shape.slot_bytes / 2**30)


def write_rest(index: IndexWriters, images: int, sums: np.ndarray) -> None:
    """Write the index arrays that are alike in both kinds of store: one image a sample."""
    index.append("images/status", [0] * images)
    index.append("images/sha256", np.zeros((images, 32), np.uint8))
    index.append("images/crc32c", sums)
    index.append("samples/tokens", [1, -200, 2] * images)
    index.append("samples/loss_mask", [0, 0, 1] * images)
    index.append("samples/tokens_offsets", np.arange(images + 1) * 3)
    index.append("samples/images", np.arange(images))
    index.append("samples/images_offsets", np.arange(images + 1))
    for name in ("images/path", "samples/id"):
        index.append(name, [48] * images)
        index.append(f"{name}_offsets", np.arange(images + 1))


def attributes(images: int, version: int, processor: dict[str, int]) -> dict[str, Any]:
    """Attributes of a store of so many samples."""
    return {
        "format": schema.FORMAT,
        "version": version,
        "plan_hash": "0" * 64,
        "processor": processor,
        "tokenizer": {},
        "counts": {"images": images, "samples": images},
        "complete": True,
    }


def sizes(images: int) -> list[tuple[int, int]]:
    """Widths and heights of views of pictures from 200x150 to 4000x3000, as Qwen3-VL would see them."""
    scales = np.exp(np.random.default_rng(1).uniform(0, math.log(20), images))
    pictured = [(round(200 * scale), round(150 * scale)) for scale in scales.tolist()]
    return [smart_resize(*size, multiple=32, min_pixels=1 << 16, max_pixels=1 << 24) for size in pictured]


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth picture with noise, uint8 (1, height, width, 3), drawn from the number."""
    (width, height), generator = size, np.random.default_rng(number)
    coarse = generator.integers(0, 240, (height // 32, width // 32, 3)).repeat(32, axis=0).repeat(32, axis=1)
    return (coarse + generator.integers(0, 16, coarse.shape)).astype(np.uint8)[None]


def write_mixed(root: Path, images: int) -> float:
    """Write a store of `images` pictures of many sizes; returns the CPU seconds of its shards per GiB."""
    parts, shapes = -(-images // MIXED_PER_PART), sizes(images)
    blocks = [num_blocks(3 * width * height) for width, height in shapes]
    shape = BlockSlots(parts, max(sum(blocks[k : k + MIXED_PER_PART]) for k in range(0, images, MIXED_PER_PART)))
    sums, starts, took = np.zeros((parts, shape.slots_per_part), np.uint32), [], 0.0
    for part in range(parts):
        numbers = range(part * MIXED_PER_PART, min((part + 1) * MIXED_PER_PART, images))
        views = [as_blocks(picture(number, shapes[number])) for number in numbers]
        begin, used = time.process_time(), 0
        with open_shard(root, part, shape) as shard:
            for filled in views:
                starts.append(part * shape.slots_per_part + used)
                shard.append(filled)
                sums[part, used : used + len(filled)] = checksums(filled)
                used += len(filled)
        took += time.process_time() - begin
    index_of_mixed(root, shape, shapes, starts, blocks, sums)
    return took / (sum(3 * width * height for width, height in shapes) / 2**30)


def index_of_mixed(
    root: Path,
    shape: BlockSlots,
    shapes: list[tuple[int, int]],
    starts: list[int],
    blocks: list[int],
    sums: np.ndarray,
) -> None:
    """Write everything of such a store except its shards."""
    images = len(shapes)
    with open_index(root, shape.version) as index:
        index.append("images/start", starts)
        index.append("images/count", blocks)
        index.append("images/grid_thw", [[1, height // 16, width // 16] for width, height in shapes])
        index.append("images/frames", [1] * images)
        index.append("images/size", shapes)
        write_rest(index, images, sums)
    write_skeleton(root, shape, attributes(images, schema.MIXED_VERSION, {"patch_size": 16, "merge_size": 2}))


def mds_reader(folder: Path, images: int) -> Read | None:
    """Random access of mosaicml-streaming to the same views.

    Args:
        folder: Where its data set is written.
        images: Number of samples.

    Returns:
        A function from a sample's number to its views, uint8 (5, 336, 336, 3); None if the package is not installed.
    """
    # Its data sets of pictures, imported with the package, want torchvision; reading samples does not.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    try:
        from streaming import LocalDataset, MDSWriter
    except ImportError as error:
        print(f"mosaicml-streaming is left out ({error}); see --help")
        return None
    with MDSWriter(out=str(folder), columns={"views": "bytes"}, size_limit=1 << 27) as writer:
        for number in range(images):
            writer.write({"views": pictures(number).tobytes()})
    dataset = LocalDataset(local=str(folder))
    return lambda number: np.frombuffer(dataset[number]["views"], np.uint8).reshape(VIEWS, 336, 336, 3)


def readers(folder: Path, images: int) -> dict[str, Read]:
    """Write the data sets, and open them in every way.

    Args:
        folder: Where they are written.
        images: Number of samples.

    Returns:
        Name of a way to its function, from a sample's number to its views, uint8 (5, 336, 336, 3).
    """
    views = range(VIEWS)
    found: dict[str, Read] = {}
    for name, checks in (("checked", True), ("unchecked", False)):
        store = Store.open(folder / "store", verify_checksums=checks)
        found[name] = lambda number, store=store: store.read_views(number, views)  # type: ignore[misc]
    packed = Store.open(folder / "packed")
    found["zstd checked"] = lambda number: packed.read_views(number, views)
    for name, suffix in (("store", ""), ("packed", " zstd")):
        pixels: Any = zarr.open_array(folder / name / "images/pixels", mode="r")
        found[f"zarr{suffix}"] = lambda number, pixels=pixels: pixels[number * VIEWS : (number + 1) * VIEWS]  # type: ignore[misc]
    by_view: Any = zarr.open_array(folder / "store/images/pixels", mode="r")
    found["zarr by view"] = lambda number: np.stack([by_view[number * VIEWS + view] for view in views])
    mds = mds_reader(folder / "mds", images)
    return found if mds is None else {**found, "mds": mds}


def mixed_readers(folder: Path, images: int) -> dict[str, Read]:
    """Open a store of views of many sizes in every way: a function from an image's number to its view."""
    store = Store.open(folder / "mixed")
    pixels: Any = zarr.open_array(folder / "mixed/images/pixels", mode="r")
    stored = [store.image(number) for number in range(images)]
    shapes = [store.view_shape(number) for number in range(images)]

    def by_zarr(number: int) -> np.ndarray:
        image = stored[number]
        return from_blocks(pixels[image.start : image.start + image.count], shapes[number])

    return {"mixed checked": lambda number: store.read_whole([number])[0], "zarr mixed": by_zarr}


def seconds(read: Read, numbers: np.ndarray) -> float:
    """Mean time of one read."""
    begin = time.perf_counter()
    for number in numbers:
        read(int(number))
    return (time.perf_counter() - begin) / len(numbers)


def measure(ways: dict[str, Read], images: int, rounds: int, reads: int) -> dict[str, list[float]]:
    """Time all ways in turns. All read the same samples, slow ones fewer of them.

    Args:
        ways: As `readers` returns them.
        images: Number of samples there are.
        rounds: Rounds in which each way is timed once.
        reads: Reads of each way in a round.

    Returns:
        Seconds of one read, by way and round.
    """
    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        numbers = generator.integers(0, images, reads)
        for name, read in ways.items():
            few = name.startswith(("zarr", "zstd"))
            times[name].append(seconds(read, numbers[: max(reads // 8, 1)] if few else numbers))
    return times


def peak_mib() -> float:
    """Largest resident size of this process so far, not counting what it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reader_memory(store_path: Path, images: int) -> float:
    """MiB that this process grows by when it opens the store and reads all of it at random, checked."""
    before = peak_mib()
    store = Store.open(store_path)
    for number in np.random.default_rng(0).permutation(images):
        store.read_views(int(number), range(VIEWS))
    return round(peak_mib() - before, 1)


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="samples in the store, 1.7 MB each")
    parser.add_argument("--mixed", type=int, default=64, help="samples of many sizes, 5.6 MB each on average")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--reads", type=int, default=100, help="reads of each kind in a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = {
            "one size": write_store(Path(folder) / "store", options.images, Compression.NONE),
            "many sizes": write_mixed(Path(folder) / "mixed", options.mixed),
        }
        write_store(Path(folder) / "packed", options.images, Compression.ZSTD)
        ways = readers(Path(folder), options.images)
        mixed, shapes = mixed_readers(Path(folder), options.mixed), sizes(options.mixed)
        for number in range(options.mixed):
            assert all(np.array_equal(read(number), picture(number, shapes[number])) for read in mixed.values()), number
        for number in range(options.images):
            assert all(np.array_equal(read(number), pictures(number)) for read in ways.values()), number
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with get_context("spawn").Pool(1) as fresh:
            memory = fresh.apply(reader_memory, (Path(folder) / "store", options.images))
        times = measure(ways, options.images, options.rounds, options.reads)
        times |= measure(mixed, options.mixed, options.rounds, max(options.reads // 8, 1))
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:14} {median * 1e3:7.3f} ms a sample, {1 / median:8.0f} samples/s")
    size = options.images * VIEWS * 336 * 336 * 3 / 2**20
    print(f"memory: reading all {options.images} samples ({size:.0f} MiB) once grew a fresh process by {memory} MiB")

    def ratio(slow: str, fast: str) -> float | None:
        if slow not in times:
            return None
        return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 2)

    print(
        "written: " + ", ".join(f"views of {kind} {taken:.2f} s of CPU time per GiB" for kind, taken in written.items())
    )
    result = {
        "against_zarr_mixed": ratio("zarr mixed", "mixed checked"),
        "written_mixed_against_one_size": round(written["one size"] / written["many sizes"], 2),
        "against_zarr": ratio("zarr", "checked"),
        "against_zarr_unchecked": ratio("zarr", "unchecked"),
        "against_zarr_by_view": ratio("zarr by view", "checked"),
        "against_zarr_compressed": ratio("zarr zstd", "zstd checked"),
        "against_mds": ratio("mds", "unchecked"),
        "memory_mib": memory,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
