"""Rules that a store's index arrays must follow, whatever the pixels are: every rule is tried, every fault is listed.

Rules work on whole arrays at once, so that a million samples take about a second. If the offsets are damaged, only
those are reported: all other rules would read beyond an array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from megatron_deepstack.config.choices import GridRule
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import BLOCK_BYTES, MIXED_VERSION, ImageStatus
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import ViewLayout, candidate_grids, layout_views, read_tile_grids
from megatron_deepstack.storekeeping.damage import REMAKE, Damage, rows

Rule = Callable[[Store], Iterator[Damage]]


def check_index(store: Store) -> list[Damage]:
    """Find every fault of the index arrays of an open store."""
    found = [damage for name in _RAGGED for damage in _offsets(store, name)]
    if found:
        return found
    return [damage for rule in _RULES for damage in rule(store)]


_RAGGED: Final = {
    "samples/tokens": "sample",
    "samples/images": "sample",
    "samples/id": "sample",
    "images/path": "image",
}
"""Flat arrays whose rows are delimited by an array of offsets, and what a row belongs to."""


def _offsets(store: Store, name: str) -> Iterator[Damage]:
    offsets = store.array(f"{name}_offsets")
    where = f"{name}_offsets"
    if offsets[0] != 0:
        yield Damage(where, f"begins with {offsets[0]}, expected 0", REMAKE)
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if len(falling):
        yield Damage(where, f"falls after {rows(falling, _RAGGED[name])}, where it may only rise", REMAKE)


def _texts(store: Store) -> Iterator[Damage]:
    for name in ("samples/id", "images/path"):
        raw, ends = store.array(name).tobytes(), store.array(f"{name}_offsets").tolist()
        broken = []
        for number in range(len(ends) - 1):
            try:
                raw[ends[number] : ends[number + 1]].decode()
            except UnicodeDecodeError:
                broken.append(number)
        if broken:
            yield Damage(name, f"{rows(np.array(broken), _RAGGED[name])}: not UTF-8", REMAKE)


def _tokens(store: Store) -> Iterator[Damage]:
    tokens, mask = store.array("samples/tokens"), store.array("samples/loss_mask")
    vocab_size = int(store.attributes.tokenizer.get("vocab_size", 1 << 31))
    image = tokens == IMAGE_TOKEN_ID
    for wrong, what, name in (
        (~image & ((tokens < 0) | (tokens >= vocab_size)), f"ids outside 0 to {vocab_size - 1}", "samples/tokens"),
        (mask > 1, "values other than 0 and 1", "samples/loss_mask"),
        (image & (mask == 1), "image placeholders that are to be learned", "samples/loss_mask"),
    ):
        places = np.flatnonzero(wrong)
        if len(places):
            yield Damage(name, f"{rows(_owners(store, 'samples/tokens', places), 'sample')}: {what}", REMAKE)
    counts = _per_row(image.astype(np.int64), store.array("samples/tokens_offsets"))
    differing = np.flatnonzero(counts != np.diff(store.array("samples/images_offsets")))
    if len(differing):
        yield Damage(
            "samples/images", f"{rows(differing, 'sample')}: as many images as placeholders were expected", REMAKE
        )


def _references(store: Store) -> Iterator[Damage]:
    images, status = store.array("samples/images"), store.array("images/status")
    outside = (images < 0) | (images >= store.num_images)
    unusable = np.zeros_like(outside)
    unusable[~outside] = status[images[~outside]] == ImageStatus.QUARANTINED
    for wrong, what in (
        (outside, f"images outside 0 to {store.num_images - 1}"),
        (unusable, "images that are quarantined and have no views"),
    ):
        places = np.flatnonzero(wrong)
        if len(places):
            owners = rows(_owners(store, "samples/images", places), "sample")
            yield Damage("samples/images", f"{owners}: {what}", REMAKE)


def _images(store: Store) -> Iterator[Damage]:
    if store.version == MIXED_VERSION:
        yield from _sized_images(store)
        return
    status, count, grid = (store.array(f"images/{name}") for name in ("status", "count", "grid"))
    unknown = np.flatnonzero(status > max(ImageStatus))
    if len(unknown):
        yield Damage("images/status", f"{rows(unknown, 'image')}: not one of {[int(s) for s in ImageStatus]}", REMAKE)
    expected = _expected_views(store)
    stored = status != ImageStatus.QUARANTINED
    for gw, gh in np.unique(grid[stored], axis=0).tolist():
        here = stored & (grid == (gw, gh)).all(axis=1)
        views = expected.get((gw, gh))
        if views is None:
            yield Damage("images/grid", f"{rows(np.flatnonzero(here), 'image')}: no grid of this processor", REMAKE)
            continue
        wrong = np.flatnonzero(here & (count != views))
        if len(wrong):
            what = f"{rows(wrong, 'image')}: a {gw} x {gh} grid has {views} views, found {count[wrong[0]]}"
            yield Damage("images/count", what, REMAKE)
    ghosts = np.flatnonzero(~stored & (count != 0))
    if len(ghosts):
        yield Damage("images/count", f"{rows(ghosts, 'image')}: quarantined, and yet with views", REMAKE)


def _sized_images(store: Store) -> Iterator[Damage]:
    """Images of one view of any size: its patches can be merged, and it has exactly the blocks that its pixels fill."""
    status, count, frames = (store.array(f"images/{name}") for name in ("status", "count", "frames"))
    grid, processor = store.array("images/grid_thw").astype(np.int64), store.attributes.processor
    patch, merge = int(processor["patch_size"]), int(processor["merge_size"])
    stored = status != ImageStatus.QUARANTINED
    odd = (grid < 1).any(axis=1) | (grid[:, 1:] % merge != 0).any(axis=1)
    for wrong, name, what in (
        (status > max(ImageStatus), "status", f"not one of {[int(s) for s in ImageStatus]}"),
        (stored & odd, "grid_thw", f"no grid of patches of which {merge} x {merge} become a token"),
        (stored & ((frames < 1) | (frames > 2)), "frames", "one frame, or a pair of them, was expected"),
        (~stored & (count != 0), "count", "quarantined, and yet with a view"),
    ):
        if wrong.any():
            yield Damage(f"images/{name}", f"{rows(np.flatnonzero(wrong), 'image')}: {what}", REMAKE)
    blocks = -(-frames.astype(np.int64) * grid[:, 1] * grid[:, 2] * patch * patch * 3 // BLOCK_BYTES)
    wrong = np.flatnonzero(stored & ~odd & (count != blocks))
    if len(wrong):
        what = f"its view fills {blocks[wrong[0]]} blocks, found {count[wrong[0]]}"
        yield Damage("images/count", f"{rows(wrong, 'image')}: {what}", REMAKE)


def _expected_views(store: Store) -> dict[tuple[int, int], int]:
    """Views of each grid that the store's processor can give."""
    processor = store.attributes.processor
    layout = ViewLayout(processor["layout"])
    if layout is ViewLayout.GLOBAL:
        return {(1, 1): 1}
    if layout is ViewLayout.TILES:
        return {grid: layout_views(layout, grid) for grid in read_tile_grids(processor["tile_grids"])}
    fixed = processor["grid"] == GridRule.FIXED_2X2
    grids = ((2, 2),) if fixed else candidate_grids(int(processor["num_crops"]))
    return {grid: layout_views(layout, grid) for grid in grids}


def _places(store: Store) -> Iterator[Damage]:
    """Each part's images lie in its shard, one after the other, from its first slot on."""
    start, count = store.array("images/start"), store.array("images/count").astype(np.int64)
    slots = store.pixels.slots_per_part
    outside = (start < 0) | (start + count > store.pixels.num_slots) | (start // slots != (start + count - 1) // slots)
    bad = np.flatnonzero(outside & (count > 0))
    if len(bad):
        yield Damage("images/start", f"{rows(bad, 'image')}: views beyond one shard", REMAKE)
        return
    used = count > 0
    begins, ends = start[used], (start + count)[used]
    follows = np.where(begins[1:] % slots == 0, begins[1:] > begins[:-1], begins[1:] == ends[:-1])
    torn = np.flatnonzero(~np.concatenate([begins[:1] % slots == 0, follows]))
    if len(torn):
        what = f"{rows(np.flatnonzero(used)[torn], 'image')}: does not follow the image before it"
        yield Damage("images/start", what, REMAKE)


def _counts(store: Store) -> Iterator[Damage]:
    status, told = store.array("images/status"), store.attributes.counts
    found = {
        "images": store.num_images,
        "flagged": int((status == ImageStatus.FLAGGED).sum()),
        "quarantined": int((status == ImageStatus.QUARANTINED).sum()),
        "views": num_views(store),
        "samples": len(store),
        "tokens": len(store.array("samples/tokens")),
        "target_tokens": int((store.array("samples/loss_mask") == 1).sum()),
    }
    for name, number in found.items():
        if told.get(name) != number:
            yield Damage("zarr.json", f"counts.{name} is {told.get(name)}, the arrays have {number}", REMAKE)


def num_views(store: Store) -> int:
    """The number of views that a store holds."""
    counts = store.array("images/count")
    return int(np.count_nonzero(counts) if store.version == MIXED_VERSION else counts.sum())


_RULES: Final[tuple[Rule, ...]] = (_texts, _tokens, _references, _images, _places, _counts)


def _owners(store: Store, name: str, places: np.ndarray) -> np.ndarray:
    """The rows that values of a flat array belong to, each named once."""
    return np.unique(np.searchsorted(store.array(f"{name}_offsets"), places, side="right") - 1)


def _per_row(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of the values of each row."""
    running = np.concatenate([[0], np.cumsum(values)])
    sums: np.ndarray = running[offsets[1:]] - running[offsets[:-1]]
    return sums
