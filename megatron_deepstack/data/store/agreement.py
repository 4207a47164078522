"""Lengths of index arrays that must agree, so that a damaged store is found at once, not at sample 400,000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.attributes import StoreAttributes
from megatron_deepstack.data.store.index import ArrayReader
from megatron_deepstack.errors import StoreError

_OF_ANOTHER_LENGTH: Final = {"images/start", "images/path", "images/path_offsets", "images/crc32c"}
"""Arrays about images whose length is not the number of images, or is checked before."""
_RAGGED: Final = ("samples/tokens", "samples/images", "samples/id", "images/path")
"""Flat arrays whose rows are delimited by an array of offsets."""


def check_counts(
    location: Location, attributes: StoreAttributes, index: Mapping[str, ArrayReader], num_slots: int
) -> None:
    """Check that index arrays and attributes agree in their lengths.

    Args:
        location: The store, for messages.
        attributes: What the store records of itself.
        index: The index arrays by name.
        num_slots: Rows of `images/pixels`.

    Raises:
        StoreError: They contradict each other; the message names every difference.
    """
    images, samples = len(index["images/start"]), len(index["samples/tokens_offsets"]) - 1
    counts = attributes.counts
    _check_rows(
        location,
        index,
        {
            "images/start": counts.get("images", -1),
            **{name: images for name in index if name.startswith("images/") and name not in _OF_ANOTHER_LENGTH},
            "images/path_offsets": images + 1,
            "images/crc32c": num_slots,
            "samples/tokens_offsets": counts.get("samples", -2) + 1,
            "samples/images_offsets": samples + 1,
            "samples/id_offsets": samples + 1,
            "samples/loss_mask": len(index["samples/tokens"]),
        },
    )
    ends = {name: index[f"{name}_offsets"] for name in _RAGGED}
    _check_rows(location, index, {name: int(offsets[len(offsets) - 1]) for name, offsets in ends.items()})


def _check_rows(location: Location, index: Mapping[str, ArrayReader], expected: Mapping[str, int]) -> None:
    found = {name: len(index[name]) for name in expected}
    wrong = [
        f"{name} has {found[name]} rows, {rows} expected" for name, rows in expected.items() if found[name] != rows
    ]
    if wrong:
        raise StoreError(f"{location}: the store contradicts itself: {'; '.join(wrong)}.")
