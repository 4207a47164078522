"""Small whole stores for tests, written without preprocessing: images on chosen grids, samples that refer to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression, GridRule
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.data.store.schema import FORMAT, VERSION, ImageStatus, PixelsShape
from megatron_deepstack.data.store.shard_writer import open_shard
from megatron_deepstack.data.store.writer import open_index, write_skeleton
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import Grid, ViewLayout, layout_views, most_views

VIEW_SIDE = 16
VOCABULARY = 61
GRIDS: tuple[Grid | None, ...] = ((2, 2), (1, 2), (3, 1), None, (2, 1), (4, 1), (2, 2), (1, 3), (1, 4))
"""Grids of the images of a store; None is a quarantined one."""
SAMPLES: tuple[tuple[int, ...], ...] = ((0,), (), (1, 2), (4,), (5, 0), (6,), (7,), (), (8,), (1,), (2, 8), ())
"""Images of each sample."""


def write_tiny_store(
    root: Path,
    *,
    grids: Sequence[Grid | None] = GRIDS,
    samples: Sequence[Sequence[int]] = SAMPLES,
    compression: Compression = Compression.NONE,
    layout: ViewLayout = ViewLayout.CROPS,
    images_per_part: int = 4,
    seed: int = 0,
    name: str = "tiny",
) -> Path:
    """Write a store of views of 16 pixels; returns `root`.

    Args:
        root: The store's folder.
        grids: Grid of each image; None is an image in quarantine.
        samples: Numbers of the images of each sample.
        compression: Codec of the views.
        layout: Which views each image has.
        images_per_part: Images of one shard.
        seed: What pixels and tokens are drawn from.
        name: What ids and paths begin with.
    """
    generator = np.random.default_rng(seed)
    num_parts = -(-len(grids) // images_per_part)
    slots = images_per_part * most_views(layout, GridRule.BEST_FIT, 4)
    pixels = PixelsShape(num_parts, slots, VIEW_SIDE, compression)
    starts, sums = [], np.zeros((num_parts, slots), np.uint32)
    for part in range(num_parts):
        with open_shard(root, part, pixels) as shard:
            for grid in grids[part * images_per_part : (part + 1) * images_per_part]:
                used = shard.used
                starts.append(part * slots + used)
                count = layout_views(layout, grid) if grid else 0
                views = generator.integers(0, 256, (count, *pixels.slot_shape), dtype=np.uint8)
                sums[part, used : used + count] = checksums(views)
                shard.append(views)
    counts = [layout_views(layout, grid) if grid else 0 for grid in grids]
    tokens = [_tokens(generator, len(images)) for images in samples]
    masks = [((np.arange(len(row)) >= len(row) // 2) & (row != IMAGE_TOKEN_ID)).astype(np.uint8) for row in tokens]
    with open_index(root) as index:
        index.append("images/start", starts)
        index.append("images/count", counts)
        index.append("images/grid", [grid or (0, 0) for grid in grids])
        index.append("images/size", [(40 * grid[0], 30 * grid[1]) if grid else (0, 0) for grid in grids])
        index.append("images/status", [ImageStatus.STORED if grid else ImageStatus.QUARANTINED for grid in grids])
        index.append("images/sha256", np.array([_digest(seed, n) if g else [0] * 32 for n, g in enumerate(grids)]))
        index.append("images/crc32c", sums)
        for array, rows in (
            ("images/path", [np.frombuffer(f"{name}/{n}.jpg".encode(), np.uint8) for n in range(len(grids))]),
            ("samples/id", [np.frombuffer(f"{name}-{n}".encode(), np.uint8) for n in range(len(samples))]),
            ("samples/tokens", tokens),
            ("samples/images", [np.array(images, np.int64) for images in samples]),
        ):
            index.append(array, np.concatenate([np.zeros(0, np.int64), *rows]))
            index.append(f"{array}_offsets", np.cumsum([0, *map(len, rows)]))
        index.append("samples/loss_mask", np.concatenate([np.zeros(0, np.uint8), *masks]))
    write_skeleton(root, pixels, _attributes(layout, counts, samples, masks, f"{seed} {name}"))
    return root


def _tokens(generator: np.random.Generator, num_images: int) -> np.ndarray:
    row = generator.integers(3, VOCABULARY, int(generator.integers(6, 14)))
    row[1 : 1 + num_images] = IMAGE_TOKEN_ID
    return row


_TILE_GRIDS = ["1x2", "1x3", "2x1", "2x2", "4x1"]


def _digest(seed: int, image: int) -> list[int]:
    return list(hashlib.sha256(f"{seed} {image}".encode()).digest())


def _attributes(
    layout: ViewLayout, counts: list[int], samples: Sequence[Sequence[int]], masks: list[np.ndarray], name: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "plan_hash": hashlib.sha256(name.encode()).hexdigest(),
        "processor": {
            "crop_size": VIEW_SIDE,
            "layout": str(layout),
            "num_crops": 4,
            "grid": str(GridRule.BEST_FIT),
            "resize": "pillow",
            "max_image_pixels": 1 << 20,
            **({"tile_grids": _TILE_GRIDS} if layout is ViewLayout.TILES else {}),
        },
        "tokenizer": {
            "sha256": "1" * 64,
            "vocab_size": VOCABULARY,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": 0,
            "template": "plain",
        },
        "counts": {
            "images": len(counts),
            "flagged": 0,
            "quarantined": counts.count(0),
            "views": sum(counts),
            "samples": len(samples),
            "dropped": 0,
            "tokens": sum(map(len, masks)),
            "target_tokens": int(sum(mask.sum() for mask in masks)),
        },
        "complete": True,
    }
