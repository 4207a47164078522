"""`store stats`: how large images and samples of a store are, as numbers and histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.quarantine import QUARANTINE_FILE, flagged_by_reason, in_words
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import MIXED_VERSION

_MOST_BINS: Final = 24
_PERCENTILES: Final = (50, 90, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often which values occur."""

    title: str
    of: str
    """What is counted."""
    bins: tuple[tuple[str, int], ...]
    """Label and count, in order."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """A store in numbers."""

    facts: tuple[tuple[str, str], ...]
    flagged: dict[str, int]
    """Images that are stored but flagged, by the kind of the reason, the most frequent first."""
    histograms: tuple[Histogram, ...]
    numbers: Mapping[str, Any]
    """The facts for programs: plain values, sizes in bytes."""

    def document(self) -> dict[str, Any]:
        """The statistics as one JSON document."""
        histograms = [
            {
                "title": one.title,
                "of": one.of,
                "bins": [{"label": label, "count": count} for label, count in one.bins],
            }
            for one in self.histograms
        ]
        return {**self.numbers, "histograms": histograms}


def statistics(store: Store, model: ModelConfig) -> Statistics:
    """Count what a store holds.

    Args:
        store: The store.
        model: Determines how many tokens an image takes.

    Returns:
        Counts, percentiles and histograms.
    """
    lengths = expanded_lengths(store, model)
    flagged = flagged_by_reason(store.location)
    facts, histograms = tuple(_facts(store, model, lengths, flagged)), tuple(_histograms(store, lengths))
    return Statistics(facts, flagged, histograms, {**_numbers(store, model, lengths), "flagged_by_reason": flagged})


def _numbers(store: Store, model: ModelConfig, lengths: np.ndarray) -> dict[str, Any]:
    shares = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").tolist() if len(lengths) else []
    return {
        "samples": len(store),
        "images": store.num_images,
        "counts": dict(store.attributes.counts),
        "variant": str(model.variant),
        "view_pixels": None if store.version == MIXED_VERSION else store.crop_size,
        "pixel_bytes": _pixel_bytes(store),
        "compression": str(store.pixels.compression),
        "tokens_with_images": int(lengths.sum()),
        "longest_sample": int(lengths.max()) if len(lengths) else 0,
        "sample_length_percentiles": {
            f"{share:g}": int(value) for share, value in zip(_PERCENTILES, shares, strict=bool(shares))
        },
    }


def _facts(store: Store, model: ModelConfig, lengths: np.ndarray, flagged: dict[str, int]) -> Iterator[tuple[str, str]]:
    counts = store.attributes.counts
    yield "samples", f"{len(store):,}"
    bad = f"{counts.get('quarantined', 0):,} quarantined, {counts.get('flagged', 0):,} flagged"
    yield "images", f"{store.num_images:,} ({bad})"
    if flagged:
        yield "flagged because of", f"{in_words(flagged)} (each is named in {QUARANTINE_FILE})"
    sides = "any size" if store.version == MIXED_VERSION else f"{store.crop_size} pixels"
    raw = f"{_pixel_bytes(store) / 2**30:.2f} GiB before compression"
    yield "views", f"{counts.get('views', 0):,} of {sides}, {raw}"
    yield "compression", str(store.pixels.compression)
    yield "text tokens", f"{counts.get('tokens', 0):,}, {counts.get('target_tokens', 0):,} of them learned"
    size = model.vision.patch_size
    yield "tokens in all", f"{int(lengths.sum()):,} with the images of {model.variant}, {size}-pixel patches"
    if len(lengths):
        shares = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").tolist()
        listed = ", ".join(f"{share:g} %: {value:,}" for share, value in zip(_PERCENTILES, shares, strict=True))
        yield "tokens of a sample", f"{listed}, longest: {lengths.max():,} (train.seq_length must hold it)"


def _histograms(store: Store, lengths: np.ndarray) -> Iterator[Histogram]:
    used = store.array("images/count") > 0
    sizes = store.array("images/size")[used]
    yield Histogram("longer side of an image, pixels", "images", _doubling(sizes.max(axis=1, initial=0)))
    if store.version == MIXED_VERSION:
        yield from _view_histograms(store, used)
    else:
        grids = store.array("images/grid")[used].tolist()
        yield Histogram("grid, columns x rows", "images", _named([f"{gw} x {gh}" for gw, gh in grids]))
        yield Histogram("views of an image", "images", _each(store.array("images/count")[used]))
    yield Histogram("images of a sample", "samples", _each(np.diff(store.array("samples/images_offsets"))))
    yield Histogram("text tokens of a sample", "samples", _even(store.lengths()))
    yield Histogram("tokens of a sample, visual ones included", "samples", _even(lengths))


def _view_histograms(store: Store, used: np.ndarray) -> Iterator[Histogram]:
    """Sizes of views of any size, and the rows that the model gets of them."""
    grid, made = store.array("images/grid_thw")[used].astype(np.int64), store.attributes.processor
    sides = grid[:, 1:].max(axis=1, initial=0) * int(made["patch_size"])
    yield Histogram("longer side of a view, pixels", "views", _doubling(sides))
    yield Histogram("tokens of a view", "views", _doubling(grid.prod(axis=1) // int(made["merge_size"]) ** 2))


def _pixel_bytes(store: Store) -> int:
    """Bytes of all views before compression."""
    if store.version != MIXED_VERSION:
        return store.pixels.slot_bytes * int(store.array("images/count").sum())
    grid, side = store.array("images/grid_thw").astype(np.int64), int(store.attributes.processor["patch_size"])
    return int((3 * store.array("images/frames").astype(np.int64) * grid[:, 1] * grid[:, 2]).sum()) * side * side


def _doubling(values: np.ndarray) -> tuple[tuple[str, int], ...]:
    """Bins from one power of two to the next."""
    if not len(values):
        return ()
    powers = np.floor(np.log2(np.maximum(values, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return tuple((f"{2**p} to {2 ** (p + 1) - 1}", int(counts[p])) for p in range(first, len(counts)))


def _named(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    found, counts = np.unique(np.array(names, dtype=str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple((str(found[k]), int(counts[k])) for k in order)


def _each(values: np.ndarray) -> tuple[tuple[str, int], ...]:
    """A bin for every value that occurs, for arrays with few different values."""
    found, counts = np.unique(values, return_counts=True)
    return tuple((str(value), int(count)) for value, count in zip(found.tolist(), counts.tolist(), strict=True))


def _even(values: np.ndarray) -> tuple[tuple[str, int], ...]:
    """Bins of one round width, from the smallest value to the largest."""
    if not len(values):
        return ()
    low, high = int(values.min()), int(values.max())
    width = next(w for w in _round_widths() if high // w - low // w < _MOST_BINS)
    counts = np.bincount(values // width - low // width)
    begins = [(low // width + k) * width for k in range(len(counts))]
    labels = [f"{b}" if width == 1 else f"{b} to {b + width - 1}" for b in begins]
    return tuple(zip(labels, counts.tolist(), strict=True))


def _round_widths() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
