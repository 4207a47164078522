"""Which images of given stores go into which shard of a new one: pure, from the index arrays.

If all images of a shard are kept, the shard is taken as it is. The kept images of the other shards are gathered, in
order, into new shards, each filled as far as possible. An image that an earlier store holds too (by the sha256 of its
file) is kept only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_deepstack.data.store.reader import Store

ImageRef = tuple[int, int]
"""Number of a source, and of an image in it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A store to take from."""

    store: Store
    samples: np.ndarray
    """Numbers of the samples to keep, ascending."""
    images: np.ndarray
    """bool (images,), True for images to keep."""


@dataclass(slots=True)
class NewPart:
    """One shard of the new store."""

    images: list[ImageRef] = field(default_factory=list)
    """Images in order, including those without views."""
    whole: tuple[int, int] | None = None
    """Source and part whose shard is taken as it is."""
    used: int = 0
    """Slots that are filled."""


@dataclass(frozen=True, slots=True)
class Regrouping:
    """The shards of the new store, and the new number of every kept image."""

    parts: list[NewPart]
    numbers: list[np.ndarray]
    """For each source, int64 (images,): its images' numbers in the new store, -1 for those not kept."""
    num_shared: int
    """Images that were in more than one source and are kept once."""

    @property
    def num_whole(self) -> int:
        """Shards taken as they are."""
        return sum(part.whole is not None for part in self.parts)


def regroup(sources: Sequence[Source], slots_per_part: int) -> Regrouping:
    """Plan the shards of a store that holds the kept images of all sources.

    Args:
        sources: Stores with what is kept of each.
        slots_per_part: Views that a shard of the new store has space for.

    Returns:
        The plan.
    """
    duplicates, num_shared = _duplicates(sources)
    parts: list[NewPart] = []
    gathered = NewPart()
    for number, source in enumerate(sources):
        counts = source.store.array("images/count")
        for part, images in _parts(source.store):
            kept = [image for image in images if source.images[image] and (number, image) not in duplicates]
            stored = [image for image in images if counts[image]]
            if stored and set(stored) <= set(kept):
                used = int(counts[stored].sum())
                parts.append(NewPart([(number, image) for image in kept], (number, part), used))
                continue
            for image in kept:
                if gathered.used + int(counts[image]) > slots_per_part:
                    parts.append(gathered)
                    gathered = NewPart()
                gathered.images.append((number, image))
                gathered.used += int(counts[image])
    if gathered.images:
        parts.append(gathered)
    return Regrouping(parts, _numbers(sources, parts, duplicates), num_shared)


def _parts(store: Store) -> Iterator[tuple[int, list[int]]]:
    """Every part with its images, in order."""
    owners = np.minimum(store.array("images/start") // store.pixels.slots_per_part, max(store.pixels.num_parts - 1, 0))
    bounds = np.searchsorted(owners, np.arange(store.pixels.num_parts + 1))
    for part in range(store.pixels.num_parts):
        yield part, list(range(int(bounds[part]), int(bounds[part + 1])))


def _duplicates(sources: Sequence[Source]) -> tuple[dict[ImageRef, ImageRef], int]:
    """Kept images that an earlier source keeps too, each with the earlier image; and their number."""
    seen: dict[bytes, ImageRef] = {}
    found: dict[ImageRef, ImageRef] = {}
    for number, source in enumerate(sources):
        digests, counts = source.store.array("images/sha256"), source.store.array("images/count")
        mine: dict[bytes, ImageRef] = {}
        for image in np.flatnonzero(source.images & (counts > 0)).tolist():
            digest = digests[image].tobytes()
            if digest in seen:
                found[number, image] = seen[digest]
            else:
                mine.setdefault(digest, (number, image))
        seen |= mine
    return found, len(found)


def _numbers(
    sources: Sequence[Source], parts: Sequence[NewPart], duplicates: dict[ImageRef, ImageRef]
) -> list[np.ndarray]:
    numbers = [np.full(source.store.num_images, -1, np.int64) for source in sources]
    for new, (source, image) in enumerate(ref for part in parts for ref in part.images):
        numbers[source][image] = new
    for (source, image), (earlier, original) in duplicates.items():
        numbers[source][image] = numbers[earlier][original]
    return numbers
