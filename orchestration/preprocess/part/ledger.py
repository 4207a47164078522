"""The ledger of a job: the plan it belongs to, and which parts are done.

    plan.json            the plan's hash and description, written first
    parts/NAME.json      a part's commit record, created once, after its data is there
    parts/NAME.bin       tokens of a part of records, until the store is finished
    .lock                the lease of the one driver at work

A record is trusted if its plan hash matches and its data has the recorded size; everything else is done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.schema import SlotsShape
from megatron_deepstack.data.store.writer import json_line, write_error, write_json
from megatron_deepstack.errors import StoreError
from orchestration.preprocess.driver.lease import LEASE_FILE
from orchestration.preprocess.part.parts import ImagePart, Part, Plan
from orchestration.preprocess.sources.ahead import ahead

PLAN_FILE: Final = "plan.json"
PARTS_FOLDER: Final = "parts"

Record = dict[str, Any]
"""A part's commit record."""


class Ledger:
    """Commit records of one plan in one store."""

    def __init__(self, root: Location, plan_hash: str, pixels: SlotsShape) -> None:
        self.root = root
        self.plan_hash = plan_hash
        self._pixels = pixels

    def commit(self, name: str, record: Record) -> None:
        """Create the record of a part. If another worker has done the same part faster, it has written the same bytes.

        Args:
            name: Name of the part.
            record: What was written of it.

        Raises:
            StoreError: The record exists with other content, since an input changed while the job ran.
        """
        path = self._path(name)
        content = json_line({"plan_hash": self.plan_hash, **record})
        try:
            path.create(content)
        except FileExistsError:
            if path.read_bytes() != content:
                raise StoreError(
                    f"{path}: the part is already recorded, with other content: an image changed while the job ran. "
                    "Preprocess into a new folder."
                ) from None
        except OSError as error:
            raise write_error(path, error) from error

    def read_all(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Record | None]]:
        """Each part with its record, in order; None, with a stale record removed, if it is to be done (again)."""
        there = {path.name for path in self.root.child(PARTS_FOLDER).list("*.json")}
        candidates = iter(ahead(self.read, (part for part in parts if f"{part.name}.json" in there)))
        for part in parts:
            yield part, next(candidates) if f"{part.name}.json" in there else None

    def read_done(self, parts: Sequence[Part]) -> Iterator[Record]:
        """The records of parts that are all done, in order."""
        for part, record in zip(parts, ahead(self.read, parts), strict=True):
            assert record is not None, f"{part.name} was done, but its record or data is gone"
            yield record

    def read(self, part: Part) -> Record | None:
        """The record of a part that is done; None, with a stale record removed, if it is to be done (again)."""
        path = self._path(part.name)
        try:
            record: Record = json.loads(path.read_bytes())
            if record["plan_hash"] == self.plan_hash and self._data_size(part) == _recorded_size(record):
                return record
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass  # torn by a crash of the machine: as good as absent
        path.delete()
        return None

    def _data_size(self, part: Part) -> int | None:
        image_part = isinstance(part, ImagePart)
        path = self.root.child(self._pixels.shard_path(part.number)) if image_part else text_path(self.root, part.name)
        try:
            return path.size()
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> Location:
        return self.root.child(f"{PARTS_FOLDER}/{name}.json")


def claim_folder(root: Location, plan: Plan) -> None:
    """Write the plan into a new store, or check that the store there is this plan's.

    Args:
        root: The store.
        plan: The plan of the job.

    Raises:
        StoreError: The folder holds the store of another plan, and the message names what differs, or anything else.
    """
    path = root.child(PLAN_FILE)
    if path.is_file():
        found = _read_plan(path)
        if found.get("plan_hash") != plan.hash:
            raise StoreError(_differences(root, found.get("description", {}), plan.description))
        return
    names = sorted({entry.name for entry in (*root.list(), *root.list(".*"))})
    others = [name for name in names if name != LEASE_FILE and not name.endswith(".partial")]
    if others:
        raise StoreError(
            f"{root}: the folder is not empty (it holds {', '.join(others[:5])}) and is no store of ours. "
            "Give an empty or a new folder."
        )
    write_json(path, {"plan_hash": plan.hash, "description": plan.description})


def text_path(root: Location, name: str) -> Location:
    """Where the tokens of a part of records are kept until the end of the job.

    Args:
        root: The store.
        name: Name of the part.

    Returns:
        The file, whether it exists or not.
    """
    return root.child(f"{PARTS_FOLDER}/{name}.bin")


def _recorded_size(record: Record) -> int:
    return int(record["shard_bytes"] if "shard_bytes" in record else record["text_bytes"])


def _read_plan(path: Location) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}. Preprocess into a new folder.") from error


def _differences(root: Location, found: dict[str, Any], asked: dict[str, Any]) -> str:
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
