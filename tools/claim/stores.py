"""The stores of the claim: preprocessed from the drawn pages, and one in which the global view replaces each crop."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from megatron_deepstack.data.store.codec import checksums
from tools.claim.experiment import DEFAULT_STORE, Experiment, StoreKind
from tools.claim.verbs import run_verb, write_recipe


def store_path(folder: Path, kind: StoreKind | str, split: str) -> Path:
    """Path of a store.

    Args:
        folder: The claim's folder.
        kind: Kind of store, or its name.
        split: Name of the split.
    """
    return folder / "stores" / f"{kind if isinstance(kind, str) else kind.name}-{split}.zarr"


def make_stores(folder: Path, experiment: Experiment, say: Callable[[str], None]) -> None:
    """Make every store that is not there yet.

    Args:
        folder: The claim's folder, with the drawn pages in `data`.
        experiment: What is compared.
        say: Called with a line about each store before it is made.
    """
    data = folder / "data"
    for kind in experiment.stores:
        for split in experiment.pages:
            target = store_path(folder, kind, split)
            if target.exists():
                continue
            say(f"store {target.name}")
            if kind.repeats_global_view:
                repeat_global_view(store_path(folder, DEFAULT_STORE, split), target)
                continue
            begun = target.with_suffix(".part")
            recipe = write_recipe(
                folder / "recipes" / f"{target.stem}.yaml",
                {
                    **experiment.base,
                    **kind.fields,
                    "name": target.stem,
                    "data.records": str(data / f"{split}.json"),
                    "data.images": str(data / "images"),
                    "data.tokenizer": str(data / "tokenizer.model"),
                    "data.store": str(begun),
                },
            )
            run_verb(["preprocess", str(recipe), "--workers", "0"], folder / "logs" / f"{target.stem}.log")
            begun.rename(target)


def repeat_global_view(source: Path, target: Path) -> None:
    """Write a copy of a store in which each crop is the image's global view.

    Args:
        source: A store of global views and crops.
        target: The new store; it appears whole or not at all.
    """
    begun = target.with_suffix(".part")
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(source, begun)
    group = zarr.open_group(begun, mode="r+")
    pixels, sums = _array(group, "images/pixels"), _array(group, "images/crc32c")
    starts, counts = np.asarray(_array(group, "images/start")[:]), np.asarray(_array(group, "images/count")[:])
    slots = pixels.shards[0] if pixels.shards else pixels.chunks[0]
    for first in range(0, pixels.shape[0], slots):
        views, part_sums = np.asarray(pixels[first : first + slots]), np.asarray(sums[first : first + slots])
        for start, count in zip(starts - first, counts, strict=True):
            if 0 <= start < slots and count:
                views[start : start + count] = views[start]
                part_sums[start : start + count] = checksums(views[start : start + count])
        pixels[first : first + slots], sums[first : first + slots] = views, part_sums
    # Another store than its source: a run that began on one does not resume on the other.
    plan_hash = hashlib.sha256(f"global views of {group.attrs['plan_hash']}".encode()).hexdigest()
    group.attrs["plan_hash"] = plan_hash
    begun.rename(target)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is {type(array).__name__}, not an array")
    return array
