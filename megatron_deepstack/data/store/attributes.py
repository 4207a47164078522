"""The attributes of a store: what its own metadata document records about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.index import parse_metadata
from megatron_deepstack.data.store.schema import FORMAT, METADATA_FILE, MIXED_VERSION, VERSION
from megatron_deepstack.errors import StoreError


@dataclass(frozen=True, slots=True)
class StoreAttributes:
    """What a store records about itself."""

    format: str
    version: int
    plan_hash: str
    """sha256 of everything that decided the store's bytes: settings, records, tokenizer, list of images."""
    processor: dict[str, Any]
    """How views were made, such as crop_size, layout, num_crops, grid, resize, max_image_pixels, orientation."""
    tokenizer: dict[str, Any]
    """sha256, vocab_size, bos_id, eos_id, pad_id, and the conversation template."""
    counts: dict[str, int]
    """images, flagged, quarantined, views, samples, dropped, tokens, target_tokens."""
    complete: bool
    """Whether preprocessing has finished."""


def read_document(location: Location) -> bytes:
    """The store's own metadata document. Raises StoreError if there is none."""
    try:
        return location.child(METADATA_FILE).read_bytes()
    except OSError as error:
        if location.is_file():
            raise StoreError(f"{location}: is a file, and a store is a folder made by `preprocess`.") from error
        if not location.is_folder():
            raise StoreError(
                f"{location}: no such folder. A store is made by `megatron-deepstack preprocess`."
            ) from error
        raise StoreError(
            f"{location}: not a store: it has no {METADATA_FILE}. Stores are made by `preprocess`."
        ) from error


def parse_attributes(location: Location, document: bytes) -> StoreAttributes:
    """The attributes in a store's metadata document.

    Args:
        location: The store, for messages.
        document: The bytes of its metadata document.

    Returns:
        The attributes.

    Raises:
        StoreError: They are missing, or belong to another format or version.
    """
    raw = parse_metadata(f"{location}/{METADATA_FILE}", document).get("attributes", {})
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise StoreError(
            f"{location}: a zarr group, but not one of ours: its `format` is {found!r}, expected {FORMAT!r}."
        )
    if raw.get("version") not in (VERSION, MIXED_VERSION):
        raise StoreError(
            f"{location}: the store has format version {raw.get('version')!r}, this program reads "
            f"{VERSION} and {MIXED_VERSION}. "
            "Preprocess the data again with this version."
        )
    names = StoreAttributes.__dataclass_fields__
    missing = [name for name in names if name not in raw]
    if missing:
        raise StoreError(f"{location}/{METADATA_FILE}: attributes {missing} are missing. Preprocess the data again.")
    return StoreAttributes(**{name: raw[name] for name in names})


def finished_attributes(location: Location, document: bytes | None = None) -> StoreAttributes:
    """The attributes of a store whose preprocessing has finished.

    Args:
        location: The store.
        document: The bytes of its metadata document; read from the store if None.

    Returns:
        The attributes.

    Raises:
        StoreError: There is no such store, or it is not finished.
        LocationError: A URL cannot be reached.
    """
    attributes = parse_attributes(location, read_document(location) if document is None else document)
    if not attributes.complete:
        raise StoreError(
            f"{location}: preprocessing of this store has not finished. Run the same `preprocess` command again: "
            "it goes on where it stopped."
        )
    return attributes
