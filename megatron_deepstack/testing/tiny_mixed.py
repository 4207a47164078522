"""Small whole stores of views of many sizes for tests, written without preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.store.blocks import as_blocks
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.data.store.schema import FORMAT, MIXED_VERSION, BlockSlots, ImageStatus
from megatron_deepstack.data.store.shard_writer import open_shard
from megatron_deepstack.data.store.writer import open_index, write_skeleton
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID

PATCH_SIZE = 16
MERGE_SIZE = 2
VOCABULARY = 61
ViewShape = tuple[int, int, int]
"""Frames (1 or 2), height and width in pixels, multiples of 32."""
SHAPES: tuple[ViewShape | None, ...] = (
    (1, 32, 64),
    (1, 160, 160),
    (2, 96, 64),
    None,
    (1, 64, 32),
    (1, 320, 256),
    (2, 160, 224),
    (1, 32, 32),
)
"""Views of the images of a store; None is a quarantined one. The second, fifth and sixth fill several blocks."""
SAMPLES: tuple[tuple[int, ...], ...] = ((0,), (), (1, 2), (4, 0, 7), (5,), (6,), (7,), (2, 6), ())
"""Images of each sample."""


def write_tiny_mixed(
    root: Path,
    *,
    shapes: Sequence[ViewShape | None] = SHAPES,
    samples: Sequence[Sequence[int]] = SAMPLES,
    compression: Compression = Compression.NONE,
    images_per_part: int = 3,
    slots_per_part: int = 20,
    seed: int = 0,
    name: str = "mixed",
) -> Path:
    """Write a store of views of many sizes.

    Args:
        root: The store's folder.
        shapes: The view of each image; None is an image in quarantine.
        samples: Numbers of the images of each sample.
        compression: Codec of the views.
        images_per_part: Images of one shard.
        slots_per_part: Blocks for which a shard has space.
        seed: What pixels and tokens are drawn from.
        name: What ids and paths begin with.

    Returns:
        `root`.
    """
    num_parts = -(-len(shapes) // images_per_part)
    pixels = BlockSlots(num_parts, slots_per_part, compression)
    starts, counts, sums = _write_shards(root, pixels, shapes, images_per_part, seed)
    generator = np.random.default_rng(seed)
    tokens = [_tokens(generator, len(images)) for images in samples]
    masks = [((np.arange(len(row)) >= len(row) // 2) & (row != IMAGE_TOKEN_ID)).astype(np.uint8) for row in tokens]
    grids = [(1, shape[1] // PATCH_SIZE, shape[2] // PATCH_SIZE) if shape else (0, 0, 0) for shape in shapes]
    with open_index(root, MIXED_VERSION) as index:
        index.append("images/start", starts)
        index.append("images/count", counts)
        index.append("images/grid_thw", grids)
        index.append("images/frames", [shape[0] if shape else 0 for shape in shapes])
        index.append("images/size", [(shape[2] - 3, shape[1] + 5) if shape else (0, 0) for shape in shapes])
        index.append("images/status", [ImageStatus.STORED if s else ImageStatus.QUARANTINED for s in shapes])
        index.append("images/sha256", np.array([_digest(seed, n) if s else [0] * 32 for n, s in enumerate(shapes)]))
        index.append("images/crc32c", sums)
        for array, rows in (
            ("images/path", [np.frombuffer(f"{name}/{n}.jpg".encode(), np.uint8) for n in range(len(shapes))]),
            ("samples/id", [np.frombuffer(f"{name}-{n}".encode(), np.uint8) for n in range(len(samples))]),
            ("samples/tokens", tokens),
            ("samples/images", [np.array(images, np.int64) for images in samples]),
        ):
            index.append(array, np.concatenate([np.zeros(0, np.int64), *rows]))
            index.append(f"{array}_offsets", np.cumsum([0, *map(len, rows)]))
        index.append("samples/loss_mask", np.concatenate([np.zeros(0, np.uint8), *masks]))
    write_skeleton(root, pixels, _attributes(counts, samples, masks, f"{seed} {name}"))
    return root


def _write_shards(
    root: Path, pixels: BlockSlots, shapes: Sequence[ViewShape | None], images_per_part: int, seed: int
) -> tuple[list[int], list[int], np.ndarray]:
    """Write all views; returns first slot and number of slots of each image, and the checksums of all slots."""
    starts, counts = [], []
    sums = np.zeros((pixels.num_parts, pixels.slots_per_part), np.uint32)
    for part in range(pixels.num_parts):
        with open_shard(root, part, pixels) as shard:
            for number in range(part * images_per_part, min((part + 1) * images_per_part, len(shapes))):
                shape = shapes[number]
                blocks = as_blocks(tiny_view(seed, number, shape)) if shape else as_blocks(np.empty(0, np.uint8))
                starts.append(part * pixels.slots_per_part + shard.used)
                counts.append(len(blocks))
                sums[part, shard.used : shard.used + len(blocks)] = checksums(blocks)
                shard.append(blocks)
    return starts, counts, sums


def _attributes(
    counts: list[int], samples: Sequence[Sequence[int]], masks: list[np.ndarray], name: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": MIXED_VERSION,
        "plan_hash": hashlib.sha256(name.encode()).hexdigest(),
        "processor": {
            "layout": "native",
            "patch_size": PATCH_SIZE,
            "merge_size": MERGE_SIZE,
            "min_pixels": 32 * 32,
            "max_pixels": 320 * 256,
        },
        "tokenizer": {"sha256": "1" * 64, "vocab_size": VOCABULARY, "bos_id": 1, "eos_id": 2, "pad_id": 0},
        "counts": {
            "images": len(counts),
            "flagged": 0,
            "quarantined": counts.count(0),
            "views": len(counts) - counts.count(0),
            "samples": len(samples),
            "dropped": 0,
            "tokens": sum(map(len, masks)),
            "target_tokens": int(sum(mask.sum() for mask in masks)),
        },
        "complete": True,
    }


def tiny_view(seed: int, number: int, shape: ViewShape) -> np.ndarray:
    """The pixels of an image of such a store.

    Args:
        seed: The store's seed.
        number: The image's number.
        shape: Frames, height and width in pixels.

    Returns:
        uint8 (frames, height, width, 3).
    """
    return np.random.default_rng((seed, number)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _tokens(generator: np.random.Generator, num_images: int) -> np.ndarray:
    row = generator.integers(3, VOCABULARY, int(generator.integers(6, 14)))
    row[1 : 1 + num_images] = IMAGE_TOKEN_ID
    return row


def _digest(seed: int, image: int) -> list[int]:
    return list(hashlib.sha256(f"{seed} {image}".encode()).digest())
