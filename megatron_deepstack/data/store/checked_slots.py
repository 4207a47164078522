"""Reading slots of many images in one call, checked, with errors that name the image.

A slot is a view, or a block of a view of any size. Each slot's crc32c was written beside it, and is compared when the
slot is read. A copy of a remote slot that is damaged is fetched again once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import google_crc32c
import numpy as np

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.index import ArrayReader
from megatron_deepstack.data.store.shards import ShardError, Shards
from megatron_deepstack.errors import StoreError

_RESTORE: Final = "Restore the shard from a copy, or preprocess into a new folder."


class ImageNames:
    """What images and their slots are called in messages."""

    def __init__(self, location: Location, index: Mapping[str, ArrayReader], slot: str) -> None:
        """Prepare to name.

        Args:
            location: The store.
            index: Its index arrays by name.
            slot: What a slot is called: a view, or a block.
        """
        self._location, self._index, self._slot = location, index, slot

    def image(self, image: int) -> str:
        """The name of an image: its number, its path and its store."""
        first, last = self._index["images/path_offsets"][image : image + 2]
        path = self._index["images/path"][int(first) : int(last)].tobytes().decode()
        return f"image {image} ({path!r}) of store {self._location}"

    def slot(self, image: int, slot: int) -> str:
        """The name of a slot within its image, such as `view 2`.

        Args:
            image: The image's number.
            slot: Row of `images/pixels`, one of the image's.

        Returns:
            The kind of slot, and its number, 0 for the image's first.
        """
        return f"{self._slot} {slot - int(self._index['images/start'][image])}"


class CheckedSlots:
    """The pixels of a store. Safe in threads, and after a fork, as its shards are."""

    def __init__(
        self,
        shards: Shards,
        checksums: ArrayReader | None,
        names: ImageNames,
    ) -> None:
        """Prepare to read.

        Args:
            shards: Where the slots come from.
            checksums: The array `images/crc32c`; None reads without checking.
            names: What images and slots are called in messages.
        """
        self._shards, self._checksums, self._names = shards, checksums, names

    def read(self, slots: list[int], images: list[int], out: np.ndarray) -> None:
        """Read slots in the order in which they lie in the shards, neighbours together.

        Args:
            slots: Rows of `images/pixels`, in any order.
            images: The image of each of them, for messages.
            out: uint8 (len(slots), *slot_shape) that receives them.

        Raises:
            StoreError: A shard is missing or short, a slot was never written, or its bytes have changed; the message
                names image, slot and shard.
        """
        self._read(slots, images, out)
        damaged = self._damaged(slots, out)
        if damaged and self._shards.forget([slots[place] for place, _ in damaged]):
            self._read(slots, images, out)
            damaged = self._damaged(slots, out)
        if damaged:
            place, written = damaged[0]
            name = f"{self._names.slot(images[place], slots[place])} of {self._names.image(images[place])}"
            raise StoreError(
                f"{self._shards.where(slots[place])}: {name} is damaged: its crc32c is "
                f"{google_crc32c.value(out[place]):08x}, {written:08x} was written. {_RESTORE}"
            )

    def _read(self, slots: list[int], images: list[int], out: np.ndarray) -> None:
        try:
            self._shards.read(slots, out)
        except ShardError as error:
            image = images[slots.index(error.slot)]
            raise StoreError(f"{error} It holds {self._names.image(image)}. {_RESTORE}") from error

    def _damaged(self, slots: Sequence[int], out: np.ndarray) -> list[tuple[int, int]]:
        """Places whose bytes differ from those that were written, each with the checksum that was written."""
        if self._checksums is None:
            return []
        written = self._checksums.take(np.array(slots, np.int64)).tolist()
        return [(place, sum_) for place, sum_ in enumerate(written) if google_crc32c.value(out[place]) != sum_]
