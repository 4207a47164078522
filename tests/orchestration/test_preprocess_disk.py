"""Disks that are too small, or fill up half-way: said before work starts, or a clear error that leaves nothing torn."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import Work

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import StoreError
from megatron_deepstack.testing.tiny_data import tiny_recipe
from orchestration.preprocess.driver import run, space

Same = Callable[[Path, Path], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; mounting one takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """A file that takes all room but `leave_bytes`."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - leave_bytes))
    return filler


@pytest.mark.slow
def test_a_disk_that_fills_up_half_way(
    heavy: Work, small_disk: Path, same_store: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = load_recipe(str(heavy.recipe), ()), small_disk / "store"
    fillers = []
    original = run.JobProgress.add

    def add(progress: Any, done: Any, node: str) -> None:
        original(progress, done, node)
        if progress.parts == 5:
            fillers.append(fill(small_disk, 4096))

    with monkeypatch.context() as patch:
        patch.setattr(run.JobProgress, "add", add)
        with pytest.raises(StoreError, match=r"could not be written: No space left on device. Nothing half-written is"):
            run.preprocess(recipe, str(store), workers=0)
    assert fillers, "the fault did not fire"
    assert len(list(store.glob("parts/*.json"))) == 5
    with pytest.raises(StoreError, match="has not finished"):
        Store.open(store)
    with pytest.raises(StoreError, match=r"could not be written: No space left on device|are needed"):
        run.preprocess(recipe, str(store), workers=0)
    fillers[0].unlink()
    assert run.preprocess(recipe, str(store), workers=0).parts_done_before == 5
    same_store(heavy.serial, store)


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_at_once(heavy: Work, small_disk: Path) -> None:
    recipe = load_recipe(str(heavy.recipe), ())
    fill(small_disk, 200_000)
    with pytest.raises(StoreError) as caught:
        run.preprocess(recipe, str(small_disk / "store"), workers=0)
    message = str(caught.value)
    found = r"/store: about \d{3} kB are needed \(estimated from 64 of 64 images, [\d.]+ kB each\), \d{3} kB are free"
    assert re.search(found, message), message
    assert "or set data.compression=zstd" in message
    assert not list((small_disk / "store").glob("images/pixels/c/*"))


@pytest.mark.parametrize("compression", Compression)
def test_the_estimate_is_close_above_what_is_written(
    corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    estimates = []

    def estimate(job: Any, todo: Any) -> None:
        estimates.append(space.estimate(job, [part for part in todo if part.name.startswith("images")]))

    monkeypatch.setattr(run, "check_space", estimate)
    recipe = tiny_recipe()
    corpus.preprocess(tmp_path, recipe=replace(recipe, data=replace(recipe.data, compression=compression)))
    written = sum(path.stat().st_size for path in tmp_path.glob("images/pixels/c/*/0/0/0"))
    assert written < estimates[0].num_bytes < 1.2 * written + 600 * 14
