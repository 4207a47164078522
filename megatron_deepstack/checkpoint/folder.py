"""Checkpoint folders: `RUN/checkpoints/step_00000100`, whole or not there.

Files are written into `step_00000100.partial`; a manifest (size and crc32c of each file, and the facts of the run) is
written last and fsynced; then the folder is renamed. A folder without a manifest, or whose files differ from it, is not
whole: it is named and passed over, and the newest whole one is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from megatron_deepstack.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PREFIX = "step_"
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Manifest:
    """Facts of a checkpoint, beside its tensors."""

    step: int
    """Steps done; the next step to run has this 0-based number."""
    facts: dict[str, Any]
    """What a resumed run must agree with: model, data, seed, ... (see `identity`)."""
    files: dict[str, tuple[int, int]]
    """Size in bytes and crc32c of each file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: Manifest


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return Path(run_dir) / "checkpoints" / f"{_PREFIX}{step:08d}"


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it counts."""
    return final.with_name(final.name + ".partial")


def commit(final: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Record checksums of the partial folder's files, then give it its name. One rank calls it, after all wrote."""
    partial = partial_path(final)
    written = sorted(file for file in partial.rglob("*") if file.is_file())
    files = {str(file.relative_to(partial)): _fingerprint(file) for file in written}
    text = json.dumps({"version": FORMAT_VERSION, "step": step, "facts": dict(facts), "files": files}, indent=1)
    with (partial / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all) and what interrupted saves left behind."""
    folders = _step_folders(run_dir)
    for _, path in folders[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    for path in (Path(run_dir) / "checkpoints").glob(f"{_PREFIX}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def newest_whole(run_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and a line on each newer one that does not.

    None if the run has no checkpoint at all. Raises CheckpointError if it has some and none is whole: starting over
    silently would throw the work away.
    """
    faults: list[str] = []
    for _, path in reversed(_step_folders(run_dir)):
        try:
            return verify(path), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        listed = "\n  ".join(faults)
        raise CheckpointError(
            f"{run_dir}: no whole checkpoint among {len(faults)}:\n  {listed}\nRestore one, or remove the folder "
            "`checkpoints` to start over."
        )
    return None, []


def verify(path: Path) -> Checkpoint:
    """Read the manifest and compare every file with it. Raises CheckpointError, naming the first file that differs."""
    manifest = _read_manifest(path)
    for name, (size, crc) in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: the file {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, {size} were written")
        if _fingerprint(file)[1] != crc:
            raise CheckpointError(f"{path}: {name} is damaged (its crc32c differs from the one recorded)")
    return Checkpoint(path=path, manifest=manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if raw["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {raw['version']}, this program reads {FORMAT_VERSION}; use the version that "
                "wrote it"
            )
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in raw["files"].items()}
        return Manifest(step=int(raw["step"]), facts=dict(raw["facts"]), files=files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its {MANIFEST} is missing or damaged ({error})") from error


def _step_folders(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Committed folders, oldest first."""
    found = []
    for path in (Path(run_dir) / "checkpoints").glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def _fingerprint(file: Path) -> tuple[int, int]:
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            checksum.update(block)
    return file.stat().st_size, int.from_bytes(checksum.digest(), "big")


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
