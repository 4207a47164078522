"""Draws the demo's data set: pictures, LLaVA-style records for training and held out, and a tokenizer.

Every picture is a pure function of (seed, split, number). So the same version of Pillow gives the same bytes again, and
a larger data set begins with the pictures of a smaller one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_deepstack.demo.page import compose_page, paint_page
from megatron_deepstack.demo.vocabulary import train_vocabulary
from megatron_deepstack.errors import DataError

QUESTIONS = (
    "What number is printed on this page?",
    "Which number does the small print repeat?",
    "Read the number in the small print.",
    "What is the number on the page?",
)
"""One of these is asked, at random. The answer is the page's number, 00 to 99 with equal chances."""
_JPEG_QUALITY = 92


def draw(output: Path, *, num_train: int, num_heldout: int, seed: int) -> None:
    """Write `output`/images/*.jpg, train.json, heldout.json and tokenizer.model.

    Args:
        output: Folder to create.
        num_train: Training pictures.
        num_heldout: Held-out pictures.
        seed: Seed of pictures and texts.

    Raises:
        DataError: `output` already holds a data set, or cannot be written.
    """
    train, heldout = output / "train.json", output / "heldout.json"
    for path in (train, heldout):
        if path.exists():
            raise DataError(f"{path} exists: {output} holds a data set already. Give another folder, or remove it.")
    try:
        (output / "images").mkdir(parents=True, exist_ok=True)
        records = {
            path: _draw_split(output, path.stem, count, seed)
            for path, count in ((train, num_train), (heldout, num_heldout))
        }
        (output / "tokenizer.model").write_bytes(train_vocabulary(QUESTIONS, [f"{n:02d}" for n in range(100)]))
        for path, split in records.items():
            path.write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{output}: cannot write the data set: {error.strerror or error}") from error


def _draw_split(output: Path, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    return [_draw_one(output, split, number, seed) for number in range(count)]


def _draw_one(output: Path, split: str, number: int, seed: int) -> dict[str, Any]:
    """Write one picture, and return its record in LLaVA's form."""
    rng = random.Random(f"{seed}/{split}/{number}")
    name = f"{split}-{number:05d}"
    page = compose_page(rng)
    paint_page(page).save(output / "images" / f"{name}.jpg", quality=_JPEG_QUALITY)
    return {
        "id": name,
        "image": f"{name}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n{rng.choice(QUESTIONS)}"},
            {"from": "gpt", "value": page.number},
        ],
    }
