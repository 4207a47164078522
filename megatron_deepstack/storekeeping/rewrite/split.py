"""`store split`: some samples of a store, drawn at random, become a store of their own, and the rest another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import StoreError
from megatron_deepstack.storekeeping.rewrite.assemble import (
    Progress,
    assemble,
    building,
    open_local,
    quarantine_lines,
    taken,
)
from megatron_deepstack.storekeeping.rewrite.regroup import Source


@dataclass(frozen=True, slots=True)
class Divided:
    """The numbers of samples and images on each side."""

    train_samples: int
    heldout_samples: int
    train_images: int
    heldout_images: int
    in_both: int
    """Images that samples of both sides use."""


def split(
    path: Path, train: Path, heldout: Path, *, count: int, seed: int, progress: Progress = lambda done, total: None
) -> Divided:
    """Divide a store's samples at random into two stores, both in the order of the store.

    Each side holds exactly the images that its samples use.

    Args:
        path: The finished store.
        train: Folder to create for the larger side.
        heldout: Folder to create for the drawn samples.
        count: Samples to draw.
        seed: Which samples are drawn.
        progress: Called with the number of shards done, and of all, once for each side.

    Returns:
        What each side holds.

    Raises:
        StoreError: An output exists, or `count` leaves one side without samples.
    """
    store = open_local(path)
    if not 0 < count < len(store):
        raise StoreError(f"{store.name}: {count} of its {len(store)} samples cannot be held out; each side needs one")
    if train.absolute() == heldout.absolute():
        raise StoreError(f"{train}: given for both sides; name two folders")
    drawn = np.zeros(len(store), bool)
    drawn[np.random.Generator(np.random.PCG64(seed)).permutation(len(store))[:count]] = True
    sides = {"train": _source(store, np.flatnonzero(~drawn)), "heldout": _source(store, np.flatnonzero(drawn))}
    with building(train) as train_draft, building(heldout) as heldout_draft:
        for draft, (side, source) in zip((train_draft, heldout_draft), sides.items(), strict=True):
            description = {"split": {"of": store.plan_hash, "count": count, "seed": seed, "side": side}}
            assemble(draft, [source], description, _lines(source), dropped=0, progress=progress)
    kept = [source.images for source in sides.values()]
    return Divided(
        train_samples=len(store) - count,
        heldout_samples=count,
        train_images=int(kept[0].sum()),
        heldout_images=int(kept[1].sum()),
        in_both=int((kept[0] & kept[1]).sum()),
    )


def _source(store: Store, samples: np.ndarray) -> Source:
    used = np.zeros(store.num_images, bool)
    used[taken(store, "samples/images", "samples/images_offsets", samples)[0]] = True
    return Source(store, samples, used)


def _lines(source: Source) -> list[bytes]:
    """Those lines of the store's quarantine.jsonl that name kept images."""
    paths = {source.store.image(int(number)).path for number in np.flatnonzero(source.images)}
    return [line for line in quarantine_lines(source.store) if json.loads(line).get("path") in paths]
