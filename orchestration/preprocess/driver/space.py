"""Will the disk hold the result? Asked before work begins, of local and shared folders; buckets have no end.

If even the worst case fits, with the most views for every image, nothing more is done. Otherwise some images, spread
evenly over the job, are processed for their sizes, and the estimate takes their mean with a margin for its error.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.images.decoder import Decoder
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.records.record import Record
from megatron_deepstack.data.store.codec import compress
from megatron_deepstack.data.store.schema import shard_index_bytes
from megatron_deepstack.data.text.conversation import encode_conversation
from megatron_deepstack.errors import StoreError
from orchestration.preprocess.part.parts import ImagePart, Part, TextPart
from orchestration.preprocess.part.work import Job
from orchestration.preprocess.units import in_units

_Item = TypeVar("_Item")

_SAMPLED_IMAGES: Final = 96
_SAMPLED_RECORDS: Final = 128
_BYTES_PER_IMAGE: Final = 600
"""Commit record and rows of index arrays."""
_BYTES_PER_RECORD: Final = 100
"""Rows of index arrays beside tokens."""
_BYTES_PER_TOKEN: Final = 10
"""Token (4) and loss mask (1), in the part's own file until the end and in the index arrays."""
_MARGIN: Final = 1.03
"""Of the estimate; and three standard errors of the sampled mean on top of it."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes a job will write."""

    num_bytes: int
    basis: str
    """How the number was found, for the message."""


def check_space(job: Job, todo: Sequence[Part]) -> None:
    """Check that the disk can hold what is to be done.

    Args:
        job: The job.
        todo: The parts that are still to be done.

    Raises:
        StoreError: It cannot; the message says how much is needed and how much is free.
    """
    if not job.root.is_local or not todo:
        return
    free = shutil.disk_usage(job.root.local_path()).free
    text = _text_bytes(job, [record for part in todo if isinstance(part, TextPart) for record in part.records])
    image_parts = [part for part in todo if isinstance(part, ImagePart)]
    if _worst_case(job, image_parts) + text <= free:
        return
    need = estimate(job, image_parts)
    if need.num_bytes + text > free:
        needed = in_units(need.num_bytes + text)
        raise StoreError(
            f"{job.root}: about {needed} are needed ({need.basis}), {in_units(free)} are free there. "
            "Make room, give another folder as data.store, or set data.compression=zstd, which takes about a quarter "
            "less; then run the same command again."
        )


def estimate(job: Job, parts: Sequence[ImagePart]) -> Need:
    """Estimate the size of shards from the sizes of some of their images.

    Args:
        job: The job.
        parts: The parts whose shards are to be written.

    Returns:
        The number of bytes, and what it is based on.
    """
    images = [(part, path) for part in parts for path in part.paths]
    sample = _spread(images, _SAMPLED_IMAGES)
    sizes = np.array(_image_sizes(job, sample), dtype=np.float64)
    error = 3 * sizes.std(ddof=1) / math.sqrt(len(sizes)) if len(sizes) > 1 else 0.0
    mean = (sizes.mean() + error * (len(sample) < len(images))) * _MARGIN if len(sizes) else 0.0
    total = int(len(images) * (mean + _BYTES_PER_IMAGE)) + len(parts) * shard_index_bytes(job.pixels)
    return Need(total, f"estimated from {len(sample)} of {len(images)} images, {in_units(mean)} each")


def _worst_case(job: Job, parts: Sequence[ImagePart]) -> int:
    """Uncompressed, and with the most slots for every image."""
    num_images = sum(len(part.paths) for part in parts)
    each = job.processor.most_slots * job.pixels.slot_bytes + _BYTES_PER_IMAGE
    return num_images * each + len(parts) * shard_index_bytes(job.pixels)


def _image_sizes(job: Job, sample: Sequence[tuple[ImagePart, str]]) -> list[int]:
    """Bytes that each image of the sample takes in the store; 0 for one that will be quarantined."""
    decoder = Decoder(job.processor, job.max_image_seconds)
    with closing(decoder), closing(decoder.decode([job.image_at(part, path) for part, path in sample])) as decoded:
        return [0 if isinstance(image, QuarantineError) else _stored_bytes(job, image.slots) for image in decoded]


def _stored_bytes(job: Job, slots: np.ndarray) -> int:
    if job.pixels.compression is Compression.NONE:
        return slots.nbytes
    return sum(len(compress(slot)) for slot in slots)


def _text_bytes(job: Job, records: Sequence[Record]) -> int:
    sample = _spread(records, _SAMPLED_RECORDS)
    if not sample:
        return 0
    lengths = [len(encode_conversation(record.turns, job.template, job.tokenizer)[0]) for record in sample]
    return int(len(records) * (_BYTES_PER_RECORD + _MARGIN * _BYTES_PER_TOKEN * float(np.mean(lengths))))


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most that many of the items, at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[len(items) * number // most] for number in range(most)]
