"""Small but real input for tests: JPEGs drawn from a seed, records about them, a SentencePiece model, a recipe."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ModelConfig, Recipe, StackConfig, VisionConfig


def tiny_recipe(*, variant: Variant = Variant.DEEPSTACK_L, data: DataConfig | None = None) -> Recipe:
    """A recipe for preprocessing in tests: views of 28 pixels, parts of 4 images, and the tiny tokenizer's vocabulary.

    Args:
        variant: Which views an image gets.
        data: The section `data`; by default parts of 4 images, of which half may be quarantined.

    Returns:
        The recipe.
    """
    model = ModelConfig(
        variant=variant,
        vision=VisionConfig(image_size=28),
        language=LanguageConfig(vocab_size=512),
        stacks=StackConfig(num_crops=4),
    )
    return Recipe(model=model, data=data or DataConfig(images_per_part=4, max_quarantined=0.5))


def draw_photo(width: int, height: int, seed: int) -> Image.Image:
    """A picture with smooth areas and edges, as photos have.

    Args:
        width: In pixels.
        height: In pixels.
        seed: What it is drawn from.

    Returns:
        The picture, RGB.
    """
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    left, top = width // 4, height // 3
    picture[top : top + height // 4, left : left + width // 3] = generator.integers(0, 256, 3, dtype=np.uint8)
    return Image.fromarray(picture)


def jpeg_bytes(width: int, height: int, seed: int, **options: Any) -> bytes:
    """A drawn photo as JPEG.

    Args:
        width: In pixels.
        height: In pixels.
        seed: What it is drawn from.
        **options: Passed to Pillow's writer of JPEG.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    draw_photo(width, height, seed).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def write_photos(folder: Path, count: int) -> list[str]:
    """JPEGs of many shapes, up to 200 x 150 pixels.

    Args:
        folder: Where they are written; made if it is not there.
        count: How many.

    Returns:
        Their names below the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [(64, 48), (48, 64), (120, 30), (31, 33), (200, 150), (17, 90)]
    names = [f"photo{number:03d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg_bytes(*shapes[number % len(shapes)], seed=number))
    return names


def record(
    identifier: str | int, images: Sequence[str], question: str = "What is it?", answer: str = "A photo."
) -> Any:
    """One record in LLaVA's form: one question and one answer.

    Args:
        identifier: Its id.
        images: Paths below the image folder; each gets a placeholder before the question.
        question: What the human says.
        answer: What is learned.
    """
    marks = "<image>\n" * len(images)
    image: dict[str, Any] = {"image": images[0]} if len(images) == 1 else {"image": list(images)} if images else {}
    turns = [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **image, "conversations": turns}


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """Write records as a JSON file.

    Args:
        path: The file.
        records: As `record` makes them, or any others, also wrong ones.

    Returns:
        The file.
    """
    path.write_text(json.dumps(records))
    return path


def write_tokenizer(path: Path) -> Path:
    """A SentencePiece model like LLaMA's (byte fallback, no normalisation), trained on a few lines."""
    lines = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: What is it? ASSISTANT: A photo. Which number is printed there? 0 1 2 3 4 5 6 7 8 9",
    ]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(buffer.getvalue())
    return path
