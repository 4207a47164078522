"""Preprocessing with Ray against the same decode-and-resize in plain processes, on 640x480 and 2000x1500 JPEGs.

Everything is DeepStack-L at 336 pixels: a global view and up to four crops an image. Three ratios:

    against_plain_processes   images/s of the whole job (Ray, decoder processes, checksums, shards on disk, index) over
                              that of as many processes that read, decode and resize, and throw the views away
    two_workers               images/s of the job on two workers over one
    torch_resize              images/s of the job with `data.resize=torch` over the exact one, everything else included

Rounds take all variants in turn, since the machine's speed drifts; ratios are the median over rounds of quotients
within a round, and the last line has the smaller of the two sizes'. Starting Ray (5 to 7 s) and its first parts, in
which workers and decoders start and import, are not counted; planning, the last part's tail and finishing are. The
last line is one JSON object. Run on an otherwise idle machine of at least two cores: python tools/bench_preprocess.py
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_deepstack.config.choices import ImageResize
from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.data.images.pictures import decode_image, make_views
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.testing.tiny_data import record, write_records, write_tokenizer
from orchestration import cluster
from orchestration.preprocess.driver.run import preprocess
from orchestration.preprocess.driver.tasks import WORKER_ENVIRONMENT

WARM_PARTS = 2
"""Parts for each worker before anything is timed."""


@dataclass(frozen=True)
class Corpus:
    """JPEGs of one size, and records about them."""

    name: str
    folder: Path
    photos: tuple[str, ...]
    part: int
    """Images per part."""


def draw(width: int, height: int, quality: int, seed: int) -> bytes:
    """A JPEG with smooth areas, edges and grain, of a photo's size in bytes.

    Args:
        width: In pixels.
        height: In pixels.
        quality: Pillow's quality of JPEG.
        seed: What it is drawn from.
    """
    generator = np.random.default_rng(seed)
    smooth = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    texture = Image.fromarray(generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    picture = Image.blend(smooth, texture.resize((width, height)), 0.25)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_corpus(root: Path, name: str, size: tuple[int, int], quality: int, images: int, part: int) -> Corpus:
    """Write JPEGs: sixteen drawings, repeated under other names.

    Args:
        root: The folder above.
        name: The corpus's name, and that of its folder.
        size: Width and height in pixels.
        quality: Pillow's quality of JPEG.
        images: How many files.
        part: Images per part of the job.
    """
    folder = root / name
    folder.mkdir()
    drawings = [draw(*size, quality, seed) for seed in range(16)]
    photos = tuple(f"{number:05d}.jpg" for number in range(images))
    for number, photo in enumerate(photos):
        (folder / photo).write_bytes(drawings[number % len(drawings)])
    print(f"{name}: {images} JPEGs of {len(drawings[0]) / 1000:.0f} kB")
    return Corpus(name, folder, photos, part)


def recipe_for(resize: ImageResize, part: int) -> Recipe:
    """A recipe with a kind of resizing and a number of images per part."""
    return replace(Recipe(), data=DataConfig(resize=resize, images_per_part=part))


def job_speed(corpus: Corpus, photos: Sequence[str], resize: ImageResize, workers: int) -> float:
    """Images per second of the whole job, on a Ray that is running.

    Args:
        corpus: Where the JPEGs are.
        photos: Those that are preprocessed.
        resize: Kind of resizing.
        workers: Worker processes.
    """
    folder = Path(tempfile.mkdtemp(dir=corpus.folder.parent))
    records = write_records(folder / "records.json", [record(photo, [photo]) for photo in photos])
    tokenizer = corpus.folder.parent / "tiny.model"
    os.sync()  # what others have written is not ours to wait for
    with silenced_stderr():
        summary = preprocess(
            recipe_for(resize, corpus.part),
            str(folder / "store"),
            records=str(records),
            images=str(corpus.folder),
            tokenizer=str(tokenizer),
            workers=workers,
        )
    assert summary.quarantined == summary.flagged == 0
    shutil.rmtree(folder)
    return summary.images_per_second


def warm_job_speed(corpus: Corpus, resize: ImageResize, workers: int) -> float:
    """Images/s of the job once its workers and decoders have started."""
    job_speed(corpus, corpus.photos[: corpus.part * WARM_PARTS * workers], resize, workers)
    return job_speed(corpus, corpus.photos, resize, workers)


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Without the job's progress."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def plain_process(connection: Connection, folder: str, photos: Sequence[str], processor: Processor) -> None:
    """What each of the plain processes does: read, decode, resize, and keep nothing.

    Args:
        connection: Tells when it is ready and done, and waits for the start.
        folder: Where the JPEGs are.
        photos: Those of this process.
        processor: Makes the views.
    """
    for photo in photos[:8]:
        processor.process((Path(folder) / photo).read_bytes())
    connection.send("ready")
    connection.recv()
    for photo in photos:
        processor.process((Path(folder) / photo).read_bytes())
    connection.send("done")


def plain_speed(corpus: Corpus, resize: ImageResize, workers: int) -> float:
    """Images per second of plain processes without Ray and zarr, from their common start to the end of the last one.

    Args:
        corpus: Where the JPEGs are.
        resize: Kind of resizing.
        workers: Number of processes.
    """
    context = get_context("spawn")
    before = dict(os.environ)
    os.environ.update(WORKER_ENVIRONMENT)
    ends, processes = [], []
    for number in range(workers):
        ours, theirs = context.Pipe()
        arguments = (theirs, str(corpus.folder), corpus.photos[number::workers], Processor.of(recipe_for(resize, 64)))
        processes.append(context.Process(target=plain_process, args=arguments))
        processes[-1].start()
        ends.append(ours)
    os.environ.clear()
    os.environ.update(before)
    for end in ends:
        end.recv()
    os.sync()
    started = time.monotonic()
    for end in ends:
        end.send("go")
    for end in ends:
        end.recv()
    seconds = time.monotonic() - started
    for process in processes:
        process.join()
    return len(corpus.photos) / seconds


def resize_seconds(corpus: Corpus, resize: ImageResize) -> float:
    """Seconds to make the five views of a decoded image, in this process."""
    pixels = decode_image((corpus.folder / corpus.photos[0]).read_bytes(), 10**8).pixels
    times = []
    for _ in range(12):
        started = time.perf_counter()
        make_views(pixels, (2, 2), ViewLayout.CROPS, 336, resize)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def run_round(corpora: Sequence[Corpus]) -> dict[str, float]:
    """One measurement of everything, images/s by `SIZE VARIANT`."""
    speeds = {}
    for corpus in corpora:
        for workers in (1, 2):
            speeds[f"{corpus.name} plain {workers}"] = plain_speed(corpus, ImageResize.PILLOW, workers)
        for kind in ImageResize:
            speeds[f"{corpus.name} resize {kind}"] = 1 / resize_seconds(corpus, kind)
    with cluster.ray_session(2, None, WORKER_ENVIRONMENT):
        for corpus in corpora:
            for kind in ImageResize:
                speeds[f"{corpus.name} job 2 {kind}"] = warm_job_speed(corpus, kind, 2)
    with cluster.ray_session(1, None, WORKER_ENVIRONMENT):
        for corpus in corpora:
            speeds[f"{corpus.name} job 1 pillow"] = warm_job_speed(corpus, ImageResize.PILLOW, 1)
    return speeds


RATIOS = {
    "against_plain_processes": ("job 2 pillow", "plain 2"),
    "two_workers": ("job 2 pillow", "job 1 pillow"),
    "torch_resize": ("job 2 torch", "job 2 pillow"),
    "plain_two_processes": ("plain 2", "plain 1"),
    "torch_resize_alone": ("resize torch", "resize pillow"),
}
"""What is divided by what; the last two show what the machine and the kernel themselves allow."""


def summarise(rounds: Sequence[dict[str, float]], corpora: Sequence[Corpus]) -> dict[str, float]:
    """Print speeds, and ratios by size.

    Args:
        rounds: As `run_round` returns them.
        corpora: Both sizes.

    Returns:
        Each ratio's smaller value of the two sizes.
    """
    for name in rounds[0]:
        print(f"{name:32} {statistics.median(each[name] for each in rounds):8.1f} /s")
    smallest = {}
    for ratio, (above, below) in RATIOS.items():
        found = {}
        for corpus in corpora:
            each = [one[f"{corpus.name} {above}"] / one[f"{corpus.name} {below}"] for one in rounds]
            found[corpus.name] = statistics.median(each)
            spread = f"{min(each):.2f} to {max(each):.2f}"
            print(f"{ratio:26} {corpus.name:10} {found[corpus.name]:.2f} ({spread})")
        smallest[ratio] = round(min(found.values()), 3)
    return smallest


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024, help="JPEGs of 640x480; a quarter as many of 2000x1500")
    parser.add_argument("--folder", help="where to write; 2 GB, the system's temporary folder by default")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_tokenizer(root / "tiny.model")
        corpora = [
            write_corpus(root, "640x480", (640, 480), 95, arguments.images, 64),
            write_corpus(root, "2000x1500", (2000, 1500), 90, arguments.images // 4, 16),
        ]
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(run_round(corpora))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        ratios = summarise(rounds, corpora)
    finally:
        shutil.rmtree(root)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
