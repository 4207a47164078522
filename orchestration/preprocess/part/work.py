"""One part, from its inputs to its commit record, in whatever process calls it. Knows nothing of Ray.

Bytes depend only on plan and inputs, so that a part done twice, or by two workers at once, does no harm.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_deepstack.data.images.decoder import SharedImage, shared_decoder
from megatron_deepstack.data.images.processors import AnyProcessor
from megatron_deepstack.data.images.source import FileAt, FramesAt, ImageAt, QuarantineError
from megatron_deepstack.data.images.video import PAIR
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.schema import ImageStatus, SlotsShape
from megatron_deepstack.data.store.shard_writer import ShardWriter, open_shard
from megatron_deepstack.data.store.writer import atomic_file
from megatron_deepstack.data.text.conversation import encode_conversation
from megatron_deepstack.data.text.tokenizer import Tokenizer
from orchestration.preprocess.part.ledger import Ledger, text_path
from orchestration.preprocess.part.parts import ImagePart, Part


@dataclass(frozen=True, slots=True)
class Job:
    """What every part of a job needs; handed to each worker once."""

    root: Location
    """The store."""
    image_folder: Location | None
    """Where images are that lie in no tar shard; None if all do."""
    plan_hash: str
    processor: AnyProcessor
    pixels: SlotsShape
    template: str
    tokenizer: Tokenizer
    max_image_seconds: float

    def image_at(self, part: ImagePart, path: str) -> ImageAt:
        """Where an image of a part is.

        Args:
            part: The part.
            path: The image as its record names it.

        Returns:
            A file below the image folder, or a member of a tar shard.
        """
        pair = part.frames.get(path)
        if pair is not None:
            return FramesAt(
                tuple(self._file_at(part, file) for file in pair.files), pair.numbers, pair.size, pair.fault
            )
        return self._file_at(part, path)

    def _file_at(self, part: ImagePart, path: str) -> FileAt:
        member = part.members.get(path)
        if member is not None:
            return member
        assert self.image_folder is not None, path
        return self.image_folder.child(path)


@dataclass(frozen=True, slots=True)
class PartDone:
    """What a worker reports; about 1 KB."""

    name: str
    images: int = 0
    records: int = 0
    flagged: int = 0
    quarantined: tuple[tuple[str, str], ...] = ()
    """Path and reason of each quarantined image."""
    written_bytes: int = 0
    seconds: float = 0.0


def do_part(job: Job, part: Part) -> PartDone:
    """Write a part's data, then its commit record. A broken image is no error: it is named in the record.

    Args:
        job: The job.
        part: The part.

    Returns:
        What was done.

    Raises:
        StoreError: The store cannot be written.
        DataError: The machine cannot read an input.
    """
    started = time.monotonic()
    if isinstance(part, ImagePart):
        record, written = _do_images(job, part)
    else:
        record, written = _do_text(job, part.name, part.records)
    Ledger(job.root, job.plan_hash, job.pixels).commit(part.name, record)
    return summarise(part.name, record, written, time.monotonic() - started)


def summarise(name: str, record: dict[str, Any], written_bytes: int = 0, seconds: float = 0.0) -> PartDone:
    """The report that goes with a commit record.

    Args:
        name: Name of the part.
        record: Its commit record.
        written_bytes: Bytes that were written, 0 if another job has done the part.
        seconds: Time that it took.

    Returns:
        The report.
    """
    images = record.get("images", [])
    bad = [image for image in images if image["status"] == ImageStatus.QUARANTINED]
    return PartDone(
        name=name,
        images=len(images),
        records=len(record.get("lengths", [])),
        flagged=sum(image["status"] == ImageStatus.FLAGGED for image in images),
        quarantined=tuple((image["path"], image["reason"]) for image in bad),
        written_bytes=written_bytes,
        seconds=seconds,
    )


def _do_images(job: Job, part: ImagePart) -> tuple[dict[str, Any], int]:
    decoder = shared_decoder(job.processor, job.max_image_seconds)
    decoded = decoder.decode([job.image_at(part, path) for path in part.paths])
    with open_shard(job.root, part.number, job.pixels) as shard, closing(decoded):
        images = [
            _put(path, image, shard, path in part.frames) for path, image in zip(part.paths, decoded, strict=True)
        ]
        size = shard.num_bytes
    return {"shard_bytes": size, "images": images}, size


def _put(path: str, image: SharedImage | QuarantineError, shard: ShardWriter, is_pair: bool) -> dict[str, Any]:
    """Append an image's views to the shard; its entry in the commit record."""
    if isinstance(image, QuarantineError):
        return {"path": path, "status": ImageStatus.QUARANTINED, "reason": str(image)}
    shard.append(image.slots)
    return {
        "path": path,
        "status": ImageStatus.STORED if image.damage is None else ImageStatus.FLAGGED,
        **({} if image.damage is None else {"reason": image.damage}),
        "grid": list(image.grid),
        **({"frames": PAIR} if is_pair else {}),
        "size": list(image.size),
        "sha256": image.sha256,
        "crc32c": image.crc32c,
    }


def _do_text(job: Job, name: str, records: tuple[Any, ...]) -> tuple[dict[str, Any], int]:
    """Tokens of all records back to back, then their loss masks; lengths go into the commit record."""
    encoded = [encode_conversation(record.turns, job.template, job.tokenizer) for record in records]
    with atomic_file(text_path(job.root, name)) as file:
        for tokens, _ in encoded:
            file.write(tokens.astype("<i4").tobytes())
        for _, mask in encoded:
            file.write(mask.tobytes())
    lengths = [len(tokens) for tokens, _ in encoded]
    size = sum(lengths) * (np.dtype("<i4").itemsize + 1)
    return {"text_bytes": size, "lengths": lengths}, size
