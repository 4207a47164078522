"""The end of a job: from commit records to index arrays, in plan order; `complete` last.

Samples that use a quarantined image are left out and listed. Whatever the order in which parts were done, the bytes
are the same; killed half-way, it starts over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.record import Record
from megatron_deepstack.data.store.quarantine import QUARANTINE_FILE, image_line
from megatron_deepstack.data.store.schema import FORMAT, MIXED_VERSION, ImageStatus, SlotsShape
from megatron_deepstack.data.store.writer import (
    IndexWriters,
    atomic_file,
    json_line,
    open_index,
    write_attributes,
    write_skeleton,
)
from orchestration.preprocess.part.ledger import PARTS_FOLDER, Ledger, text_path
from orchestration.preprocess.part.parts import ImagePart, Plan, TextPart
from orchestration.preprocess.sources.ahead import ahead


def begin_store(root: Location, plan: Plan) -> None:
    """Write what a store holds before its first part: metadata and attributes that say it is not complete.

    Args:
        root: The store.
        plan: The plan of the job.
    """
    write_skeleton(root, plan.pixels, _attributes(plan, counts={}, complete=False))


def finish_store(ledger: Ledger, plan: Plan) -> dict[str, int]:
    """Write index arrays and quarantine list, and mark the store complete. All parts are done.

    Args:
        ledger: The records of the finished parts.
        plan: The plan of the job.

    Returns:
        Numbers of images and samples by kind.
    """
    root = ledger.root
    with open_index(root, plan.pixels.version) as index:
        images = _write_images(plan, ledger, index)
        samples = _write_samples(plan, ledger, index, images.status)
    write_quarantine(root, [*images.listed, *samples.dropped])
    counts = {**images.counts(), **samples.counts()}
    _check_counts(plan, counts)
    write_attributes(root, _attributes(plan, counts=counts, complete=True))
    clear_leftovers(root)
    return counts


def clear_leftovers(root: Location) -> None:
    """Remove what a finished store no longer needs: tokens of parts, and files that a kill left half-written."""
    for _ in ahead(Location.delete, root.child(PARTS_FOLDER).list("*.bin")):
        pass
    if root.is_local:
        for path in root.local_path().rglob(".*.partial"):
            path.unlink(missing_ok=True)


def write_quarantine(root: Location, lines: Iterable[dict[str, Any]]) -> None:
    """Write the list of what was left out or is damaged.

    Args:
        root: The store.
        lines: One object for each image or record.
    """
    with atomic_file(root.child(QUARANTINE_FILE)) as file:
        for line in lines:
            file.write(json_line(line))


def _attributes(plan: Plan, *, counts: dict[str, int], complete: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": plan.pixels.version,
        "plan_hash": plan.hash,
        "processor": plan.processor.describe(),
        "tokenizer": {**plan.description["tokenizer"], "template": plan.template},
        "counts": counts,
        "complete": complete,
    }


@dataclass(frozen=True, slots=True)
class _Images:
    """What was written about images."""

    status: np.ndarray
    """uint8 (images,): ImageStatus of each."""
    num_views: int
    listed: list[dict[str, Any]]
    """Lines of the quarantine list: quarantined and flagged images."""

    def counts(self) -> dict[str, int]:
        flagged, quarantined = (int((self.status == s).sum()) for s in (ImageStatus.FLAGGED, ImageStatus.QUARANTINED))
        return {
            "images": len(self.status),
            "flagged": flagged,
            "quarantined": quarantined,
            "views": self.num_views,
        }


@dataclass(slots=True)
class _Samples:
    """What was written about samples."""

    dropped: list[dict[str, Any]]
    """Lines of the quarantine list: samples that use a quarantined image."""
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0

    def counts(self) -> dict[str, int]:
        return {
            "samples": self.num_samples,
            "dropped": len(self.dropped),
            "tokens": self.num_tokens,
            "target_tokens": self.num_targets,
        }


def _check_counts(plan: Plan, counts: Mapping[str, int]) -> None:
    """Nothing disappears: every record is a sample or named as dropped, every image is stored, flagged or named."""
    assert counts["images"] == len(plan.images), (counts, len(plan.images))
    assert counts["samples"] + counts["dropped"] == len(plan.records), (counts, len(plan.records))


def _write_images(plan: Plan, ledger: Ledger, index: IndexWriters) -> _Images:
    status: list[int] = []
    listed: list[dict[str, Any]] = []
    num_views = 0
    paths = _Offsets(index, "images/path")
    for part, record in zip(plan.image_parts, ledger.read_done(plan.image_parts), strict=True):
        images = record["images"]
        assert [image["path"] for image in images] == list(part.paths), part.name
        num_views += _write_image_part(part, images, plan.pixels, index)
        paths.append_texts([image["path"] for image in images])
        status += [image["status"] for image in images]
        bad = (image for image in images if image["status"] != ImageStatus.STORED)
        listed += [image_line(image["status"], image["path"], image["reason"]) for image in bad]
    return _Images(np.array(status, dtype=np.uint8), num_views, listed)


def _write_image_part(part: ImagePart, images: list[dict[str, Any]], pixels: SlotsShape, index: IndexWriters) -> int:
    """Rows of one part's images; returns its number of views."""
    checksums = [image.get("crc32c", []) for image in images]
    counts = [len(sums) for sums in checksums]
    slots = pixels.slots_per_part
    starts = part.number * slots + np.cumsum([0, *counts[:-1]])
    row_sums = np.zeros(slots, dtype=np.uint32)
    row_sums[: sum(counts)] = [value for sums in checksums for value in sums]
    index.append("images/start", starts)
    index.append("images/count", counts)
    index.append("images/size", [image.get("size", [0, 0]) for image in images])
    index.append("images/status", [image["status"] for image in images])
    index.append("images/sha256", np.array([_digest(image) for image in images], dtype=np.uint8))
    index.append("images/crc32c", row_sums)
    if pixels.version == MIXED_VERSION:
        index.append("images/grid_thw", [image.get("grid", [0, 0, 0]) for image in images])
        index.append("images/frames", [image.get("frames", 1) if image.get("crc32c") else 0 for image in images])
        return sum(count > 0 for count in counts)
    index.append("images/grid", [image.get("grid", [0, 0]) for image in images])
    return sum(counts)


def _write_samples(plan: Plan, ledger: Ledger, index: IndexWriters, status: np.ndarray) -> _Samples:
    """Rows of all samples, one part of records at a time."""
    numbers = {path: number for number, path in enumerate(plan.images)}
    samples = _Samples(dropped=[])
    ids, images, tokens = (_Offsets(index, f"samples/{name}") for name in ("id", "images", "tokens"))
    texts = ahead(lambda part: text_path(ledger.root, part.name).read_bytes(), plan.text_parts)
    records = ledger.read_done(plan.text_parts)
    for part, record, data in zip(plan.text_parts, records, texts, strict=True):
        kept = []
        for text in _split_text(part, record["lengths"], data):
            used = [numbers[path] for path in text.record.images]
            bad = [plan.images[number] for number in used if status[number] == ImageStatus.QUARANTINED]
            if bad:
                line = {"kind": "sample dropped", "id": text.record.id, "images": list(dict.fromkeys(bad))}
                samples.dropped.append(line)
            else:
                kept.append((text, used))
        ids.append_texts([text.record.id for text, _ in kept])
        images.append([used for _, used in kept])
        tokens.append([text.tokens for text, _ in kept])
        masks = _join([text.mask for text, _ in kept], np.uint8)
        index.append("samples/loss_mask", masks)
        samples.num_samples += len(kept)
        samples.num_tokens += len(masks)
        samples.num_targets += int(masks.sum())
    return samples


@dataclass(frozen=True, slots=True)
class _Text:
    """A record and what it was encoded to."""

    record: Record
    tokens: np.ndarray
    mask: np.ndarray


def _split_text(part: TextPart, lengths: list[int], data: bytes) -> Iterator[_Text]:
    """The records of a part with their tokens; zip's strictness asserts that none is missing."""
    total = sum(lengths)
    tokens = np.frombuffer(data, dtype="<i4", count=total)
    masks = np.frombuffer(data, dtype=np.uint8, offset=tokens.nbytes)
    assert len(masks) == total, (part.name, len(masks), total)
    first = 0
    for record, length in zip(part.records, lengths, strict=True):
        yield _Text(record, tokens[first : first + length], masks[first : first + length])
        first += length


class _Offsets:
    """A flat array of ragged rows and its array of offsets."""

    def __init__(self, index: IndexWriters, name: str) -> None:
        self._index, self._name, self._end = index, name, 0
        index.append(f"{name}_offsets", [0])

    def append(self, rows: Sequence[np.ndarray | list[int]]) -> None:
        """Append rows of the flat array's values."""
        self._index.append(self._name, _join(rows, np.int64))
        ends = self._end + np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._index.append(f"{self._name}_offsets", ends)
        self._end = int(ends[-1]) if len(ends) else self._end

    def append_texts(self, texts: Sequence[str]) -> None:
        """Append texts as UTF-8 bytes."""
        self.append([np.frombuffer(text.encode(), dtype=np.uint8) for text in texts])


def _join(rows: Sequence[np.ndarray | list[int]], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)])


def _digest(image: Mapping[str, Any]) -> list[int]:
    return list(bytes.fromhex(image.get("sha256", hashlib.sha256().digest_size * "00")))
