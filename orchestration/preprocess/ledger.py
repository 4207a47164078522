"""The ledger of a job: the plan it belongs to, which parts are done, and who is working on it.

    plan.json            the plan's hash and description, written first
    parts/NAME.json      a part's commit record, created once, after its data is on disk
    parts/NAME.bin       tokens of a part of records, until the store is finished
    .lock                held by the one driver at work; the system releases it when the driver dies

A record is trusted if its plan hash matches and its data has the recorded size; everything else is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.data.schema import shard_path
from megatron_deepstack.data.writer import atomic_file, json_bytes, write_error, write_json
from megatron_deepstack.errors import StoreError
from orchestration.preprocess.parts import ImagePart, Part, Plan

PLAN_FILE: Final = "plan.json"
PARTS_FOLDER: Final = "parts"
LOCK_FILE: Final = ".lock"


@contextmanager
def lock_store(root: Path) -> Iterator[None]:
    """Hold the store's lock; raises StoreError if another driver holds it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(root / LOCK_FILE, "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise write_error(root, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise StoreError(
                f"{root}: another preprocessing job is writing this store ({file.read().strip() or 'holder unknown'}). "
                "Wait for it, or stop it and run this command again."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


class Ledger:
    """Commit records of one plan in one store."""

    def __init__(self, root: Path, plan_hash: str) -> None:
        self.root = root
        self.plan_hash = plan_hash

    def commit(self, name: str, record: dict[str, Any]) -> None:
        """Create the record of a part. A twin that was faster has written the same bytes.

        Raises StoreError if the record exists with other content: an input changed while the job ran.
        """
        path = self._path(name)
        content = json_bytes({"plan_hash": self.plan_hash, **record})
        proposal = path.with_name(f".{name}.{os.uname().nodename}.{os.getpid()}.partial")
        with atomic_file(proposal) as file:
            file.write(content)
        try:
            os.link(proposal, path)
        except FileExistsError:
            if path.read_bytes() != content:
                raise StoreError(
                    f"{path}: the part is already recorded, with other content: an image changed while the job ran. "
                    "Preprocess into a new folder."
                ) from None
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            proposal.unlink(missing_ok=True)

    def read(self, part: Part) -> dict[str, Any] | None:
        """The record of a part that is done; None, with a stale record removed, if it is to be done (again)."""
        path = self._path(part.name)
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            if record["plan_hash"] == self.plan_hash and self._data_size(part) == _recorded_size(record):
                return record
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass  # torn by a crash of the machine: as good as absent
        path.unlink()
        return None

    def _data_size(self, part: Part) -> int | None:
        path = self.root / shard_path(part.number) if isinstance(part, ImagePart) else text_path(self.root, part.name)
        return path.stat().st_size if path.is_file() else None

    def _path(self, name: str) -> Path:
        return self.root / PARTS_FOLDER / f"{name}.json"


def claim_folder(root: Path, plan: Plan) -> None:
    """Write the plan into a new store, or check that the store there is this plan's.

    Raises StoreError, naming what differs, for another plan's store, and for a folder that holds anything else.
    """
    path = root / PLAN_FILE
    if path.is_file():
        found = _read_plan(path)
        if found.get("plan_hash") != plan.hash:
            raise StoreError(_differences(root, found.get("description", {}), plan.description))
        return
    others = sorted(entry.name for entry in root.iterdir() if entry.name != LOCK_FILE and ".partial" not in entry.name)
    if others:
        raise StoreError(
            f"{root}: the folder is not empty (it holds {', '.join(others[:5])}) and is no store of ours. "
            "Give an empty or a new folder."
        )
    write_json(path, {"plan_hash": plan.hash, "description": plan.description})


def text_path(root: Path, name: str) -> Path:
    """Where the tokens of a part of records wait for the end of the job."""
    return root / PARTS_FOLDER / f"{name}.bin"


def _recorded_size(record: dict[str, Any]) -> int:
    return int(record["shard_bytes"] if "shard_bytes" in record else record["text_bytes"])


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}. Preprocess into a new folder.") from error


def _differences(root: Path, found: dict[str, Any], asked: dict[str, Any]) -> str:
    lines = [
        f"{name}: {there} there, {here} asked for" for name, there, here in _flat_pairs(found, asked) if there != here
    ]
    listed = "\n  ".join(lines)
    return (
        f"{root} holds the store of another plan:\n  {listed}\n"
        "Preprocess into another folder, or delete this one if it is no longer needed."
    )


def _flat_pairs(found: dict[str, Any], asked: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, here in asked.items():
        there = found.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from ((f"{name}.{key}", there.get(key), value) for key, value in here.items())
        else:
            yield name, there, here
