"""`store merge`: several stores made by the same processor and tokenizer, as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import StoreError
from megatron_deepstack.storekeeping.rewrite.assemble import Progress, assemble, building, open_local, quarantine_lines
from megatron_deepstack.storekeeping.rewrite.regroup import Source


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge, in numbers."""

    samples: int
    images: int
    shared: int
    """Images that several of the stores had, kept once."""
    shards: int
    whole: int
    """Shards taken as they were."""


def merge(output: Path, inputs: Sequence[Path], progress: Progress = lambda done, total: None) -> Merged:
    """Write a store with all samples of several stores, in their order.

    Args:
        output: Folder to create.
        inputs: Folders of two or more finished stores that were made with equal settings.
        progress: Called with the number of shards done, and of all.

    Returns:
        Numbers of what was written.

    Raises:
        StoreError: `output` exists, an input is not finished, or two inputs were made differently.
    """
    if len(inputs) < 2:
        raise StoreError(f"merging takes two stores or more; {len(inputs)} given")
    stores = [open_local(path) for path in inputs]
    for store in stores[1:]:
        _require_alike(stores[0], store)
    sources = [Source(store, np.arange(len(store)), np.ones(store.num_images, bool)) for store in stores]
    description = {"merge": [store.plan_hash for store in stores]}
    lines = [line for store in stores for line in quarantine_lines(store)]
    dropped = sum(store.attributes.counts.get("dropped", 0) for store in stores)
    with building(output) as draft:
        plan = assemble(draft, sources, description, lines, dropped=dropped, progress=progress)
    images = sum(len(part.images) for part in plan.parts)
    return Merged(sum(map(len, stores)), images, plan.num_shared, len(plan.parts), plan.num_whole)


def _require_alike(first: Store, other: Store) -> None:
    """Raise StoreError, naming every difference, unless both were made by one processor and tokenizer."""
    lines = [
        f"{name}: {here} in {first.name}, {there} in {other.name}"
        for name, here, there in _pairs(first, other)
        if here != there
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise StoreError(
            f"{first.name} and {other.name} were made differently and cannot become one store:\n  {listed}\n"
            "Preprocess one of them again as the other was, or train on both as they are: data.stores mixes stores "
            "whose tokenizers agree."
        )


_BEFORE: Final = {"orientation": "as_stored", "deep_grey": "as_published", "transparency": "as_published"}
"""The values with which stores were made before these options existed."""


def _pairs(first: Store, other: Store) -> Iterator[tuple[str, Any, Any]]:
    yield "version", first.version, other.version
    yield "compression", str(first.pixels.compression), str(other.pixels.compression)
    for group in ("processor", "tokenizer"):
        here, there = getattr(first.attributes, group), getattr(other.attributes, group)
        for name in dict.fromkeys((*here, *there)):
            yield f"{group}.{name}", here.get(name, _BEFORE.get(name)), there.get(name, _BEFORE.get(name))
