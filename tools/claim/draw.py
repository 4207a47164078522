"""Draws the claim's data set: pages of every kind in equal numbers, records in LLaVA's form, and a tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from megatron_deepstack.demo.vocabulary import train_vocabulary
from tools.claim.pages import ANSWERS, KINDS, QUESTIONS, compose

SYSTEM = "A chat."
"""What stands before each question. The template's own text would be half of each sample."""
_JPEG_QUALITY = 92


def draw(folder: Path, splits: Iterable[tuple[str, int]]) -> None:
    """Write `folder`/images, one JSON file of records per split, and tokenizer.model; what is there stays.

    Args:
        folder: The data set's folder.
        splits: Name of each split, and its number of pages of each kind.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.model", partial(train_vocabulary, QUESTIONS, ANSWERS))
    for split, per_kind in splits:
        _write(folder / f"{split}.json", partial(_records, folder, split, per_kind))


def _write(path: Path, content: Callable[[], bytes]) -> None:
    """Write a file whole, unless it is there."""
    if path.exists():
        return
    begun = path.with_suffix(".part")
    begun.write_bytes(content())
    os.replace(begun, path)


def _records(folder: Path, split: str, per_kind: int) -> bytes:
    records = []
    for number in range(per_kind):
        for kind in KINDS:
            name = f"{split}-{kind}-{number:05d}"
            document = compose(kind, f"{split}/{number}")
            document.picture.save(folder / "images" / f"{name}.jpg", quality=_JPEG_QUALITY)
            records.append(
                {
                    "id": name,
                    "image": f"{name}.jpg",
                    "system": SYSTEM,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{document.question}"},
                        {"from": "gpt", "value": document.answer},
                    ],
                }
            )
    return (json.dumps(records, indent=1) + "\n").encode()
