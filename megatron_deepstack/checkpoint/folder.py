"""Checkpoint folders: `RUN/checkpoints/step_00000100`, whole or not there.

Files are written into `step_00000100.partial`; a manifest (size and crc32c of each file, and the facts of the run) is
written last and fsynced; then the folder is renamed. A folder without a manifest, or whose files differ from it, is not
whole: it is named and passed over, and the newest whole one is taken.
"""

from __future__ import annotations

import errno
import json
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.platform.files.rename import sync
from megatron_deepstack.platform.files.write_whole import write_through

MANIFEST = "manifest.json"
FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
"""Version 1 had neither layout nor programs' versions. Up to version 2 local layers and Transformer Engine's gave norms
names of their own; up to version 3 still where some layers of a decoder have experts and others have none."""
REMOVED = ".removed"
"""Ending of folders that are being deleted."""
_PREFIX = "step_"
_BLOCK_BYTES = 1 << 22


_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""What file systems answer for files that are gone or broken; any other error says nothing about their content."""


class OutOfReach(CheckpointError):
    """A checkpoint cannot be read at present (permissions, a server that is away): it may well be whole."""


def out_of_reach(path: Path, name: str, error: OSError) -> OutOfReach | None:
    """What an error of the file system says about a checkpoint.

    Args:
        path: The checkpoint.
        name: The file that was read.
        error: What the system answered.

    Returns:
        None if the file is gone or broken; else an error: to go on from an older checkpoint would throw away work.
    """
    if error.errno in _DAMAGE:
        return None
    return OutOfReach(
        f"{path}: {name} cannot be read ({error.strerror or error}). That says nothing about what it holds, so no "
        "older checkpoint is taken in its place. Look at its permissions and its file system, then run the same "
        "command again"
    )


@dataclass(frozen=True, slots=True)
class Manifest:
    """Facts of a checkpoint, beside its tensors."""

    step: int
    """Steps done; the next step to run has this 0-based number."""
    facts: dict[str, Any]
    """What a resumed run must agree with: model, data, seed, ... (see `identity`)."""
    files: dict[str, tuple[int, int]]
    """Size in bytes and crc32c of each file."""
    layout: dict[str, int] = field(default_factory=dict)
    """Ranks on each axis when it was written, for information and for states that belong to a rank."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions of the programs that wrote it."""
    samples: dict[str, Any] = field(default_factory=dict)
    """What the run read when it was written: `stores` and `num_samples`. Empty in older ones."""
    version: int = FORMAT_VERSION
    weights_alone: bool = False
    """It was made of a folder of weights: there is no optimizer, and `facts` are those of the model alone."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: Manifest


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after a number of steps, whether it exists or not.

    Args:
        run_dir: The run folder.
        step: Steps done.

    Returns:
        The folder.
    """
    return checkpoints_folder(run_dir) / f"{_PREFIX}{step:08d}"


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it counts."""
    return final.with_name(final.name + ".partial")


def checkpoints_folder(run_dir: str | Path) -> Path:
    """Where a run's checkpoints lie."""
    return RunFolder(run_dir).checkpoints


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and bring it to the disk. From then on the folder's content counts.

    Args:
        folder: The partial folder, with all other files in it.
        manifest: What is written, with sizes and checksums of those files.

    Raises:
        OSError: The disk refuses.
    """
    write_through(folder / MANIFEST, manifest_to_json(manifest))


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest's text."""
    content = {
        "version": manifest.version,
        "step": manifest.step,
        "facts": manifest.facts,
        "layout": manifest.layout,
        "made_with": manifest.made_with,
        "samples": manifest.samples,
        "files": manifest.files,
        **({"weights_alone": True} if manifest.weights_alone else {}),
    }
    return json.dumps(content, indent=1, allow_nan=False)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its final name. A damaged folder that has this name is deleted.

    Args:
        partial: The finished folder, under the name it was written with.
        final: The name it gets, in the same parent folder.

    Raises:
        OSError: The disk refuses.
    """
    sync(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill in between does not leave a damaged checkpoint.

    Raises OSError where it cannot be renamed.
    """
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def newest_whole(run_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and a line on each newer one that does not.

    Args:
        run_dir: The run folder.

    Returns:
        The checkpoint, or None if the run has no checkpoint at all; and the lines.

    Raises:
        CheckpointError: The run has checkpoints and none is whole, or one cannot be read at present. Starting over
            without a word would lose the work.
    """
    return first_whole(run_dir, [path for _, path in reversed(step_folders(run_dir))], verify)


def first_whole(
    run_dir: str | Path, folders: Sequence[Path], verify: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[str]]:
    """The first of several checkpoints that is whole, as `newest_whole` finds it.

    Args:
        run_dir: The run folder, for the message.
        folders: The checkpoints, newest first.
        verify: As `verify` below, or another function that raises the same errors.

    Returns:
        As `newest_whole`.

    Raises:
        CheckpointError: As `newest_whole`.
    """
    faults: list[str] = []
    for path in folders:
        try:
            return verify(path), faults
        except OutOfReach:
            raise
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise _none_whole(run_dir, faults)
    return None, []


def _none_whole(run_dir: str | Path, faults: Sequence[str]) -> CheckpointError:
    listed = "\n  ".join(faults)
    return CheckpointError(
        f"{run_dir}: no whole checkpoint among {len(faults)}:\n  {listed}\nRestore one, or remove the folder "
        "`checkpoints` to start over."
    )


def verify(path: Path) -> Checkpoint:
    """Read the manifest and compare every file with it. Raises CheckpointError, naming the first file that differs."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.manifest.files:
        verify_content(checkpoint, name)
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint by its manifest; its files are there and have the right size, their content is not read.

    Raises CheckpointError, naming the first file that is not.
    """
    manifest = _read_manifest(path)
    for name, (size, _) in manifest.files.items():
        file = path / name
        try:
            found = file.stat()
        except OSError as error:
            raise out_of_reach(path, name, error) or CheckpointError(f"{path}: the file {name} is missing") from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: the file {name} is missing")
        if found.st_size != size:
            raise CheckpointError(f"{path}: {name} has {found.st_size} bytes, {size} were written")
    return Checkpoint(path=path, manifest=manifest)


def verify_content(checkpoint: Checkpoint, name: str) -> None:
    """Compare one file's size and checksum with those in the manifest.

    Args:
        checkpoint: The checkpoint that the file belongs to.
        name: Name of the file, as in the manifest.

    Raises:
        OutOfReach: The file cannot be read at present.
        CheckpointError: The file is damaged or cannot be read.
    """
    try:
        found = fingerprint(checkpoint.path / name)
    except OSError as error:
        raise out_of_reach(checkpoint.path, name, error) or CheckpointError(
            f"{checkpoint.path}: {name} cannot be read ({error})"
        ) from error
    if found != checkpoint.manifest.files[name]:
        raise CheckpointError(f"{checkpoint.path}: {name} is damaged (its crc32c differs from the one recorded)")


def looks_whole(path: Path) -> bool:
    """Whether manifest, names and sizes are right."""
    try:
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _read_manifest(path: Path) -> Manifest:
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        away = out_of_reach(path, MANIFEST, error) if isinstance(error, OSError) else None
        raise away or CheckpointError(f"{path}: its {MANIFEST} is missing or damaged ({error})") from error
    return manifest_from_json(path, text)


def manifest_from_json(path: Path, text: str) -> Manifest:
    """Parse a manifest.

    Args:
        path: The checkpoint's folder, for messages.
        text: Content of its manifest file, in JSON.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The text is damaged, or the format's version is not one that this program reads.
    """
    try:
        raw = json.loads(text)
        if raw["version"] not in READABLE_VERSIONS:
            raise CheckpointError(
                f"{path}: format version {raw['version']}, this program reads up to {FORMAT_VERSION}; use the version "
                "that wrote it"
            )
        return Manifest(
            step=int(raw["step"]),
            facts=dict(raw["facts"]),
            files={str(name): (int(size), int(crc)) for name, (size, crc) in raw["files"].items()},
            layout=dict(raw.get("layout", {})),
            made_with=dict(raw.get("made_with", {})),
            samples=dict(raw.get("samples", {})),
            version=int(raw["version"]),
            weights_alone=bool(raw.get("weights_alone", False)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its {MANIFEST} is missing or damaged ({error})") from error


def step_folders(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Committed folders with their steps, oldest first."""
    found = []
    for path in checkpoints_folder(run_dir).glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def fingerprint(file: Path) -> tuple[int, int]:
    """Size in bytes and crc32c of a file."""
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            checksum.update(block)
    return file.stat().st_size, int.from_bytes(checksum.digest(), "big")
