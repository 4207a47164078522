"""`convert --check`: do two folders of different layouts compute the same?

Each side computes in float32 and in its own way: transformers loads a folder of its own layout and prepares pictures
with that folder's processor; a folder of published names and a checkpoint are computed by this system. Questions are
drawn: tokens, with drawn pictures or none; given pictures are added. Compared are pixels, logits, and the tokens that
follow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from megatron_deepstack.config.schema import ModelConfig, Recipe
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.hf_config import read_config
from megatron_deepstack.convert.hf_facts import CONFIG
from megatron_deepstack.convert.hf_whole import WHOLE_MODELS
from megatron_deepstack.convert.hf_written import DEEPSTACK
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.errors import ConfigError, DataError, ParityError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.run_folder.recipe import recipe_of_run
from megatron_deepstack.testing.compare import relative_error
from megatron_deepstack.testing.parity.by_folder import by_own_code
from megatron_deepstack.testing.parity.by_transformers import special_tokens
from megatron_deepstack.testing.parity.check import LOGITS_TOLERANCE, ParityLine
from megatron_deepstack.testing.parity.drawn import DrawnSample, draw_samples
from megatron_deepstack.testing.parity.one_rank import Weights, answers_on_rank
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny_data import draw_photo

PIXELS_TOLERANCE: Final = 1e-5
"""Largest difference of a normalised pixel: one rounding of float32 at values up to 4."""
NUM_NEW_TOKENS: Final = 8
"""Tokens that each question is continued by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Tokens and pictures, which each side prepares by itself."""

    sample: DrawnSample
    """Tokens, and the views that this system makes of the pictures."""
    pictures: tuple[bytes, ...] = ()
    """Files of the pictures; empty where views are drawn instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A folder or run, and who computes it."""

    path: Path
    model: ModelConfig
    recipe: Recipe
    """How it prepares pictures, if this system does it."""
    by_transformers: bool
    is_run: bool

    @classmethod
    def of(cls, path: Path) -> Side:
        """Look at a folder.

        Raises:
            CheckpointError, ConfigError: It is neither a run nor a folder of weights that `convert` reads.
        """
        if not (path / CONFIG).is_file() and not read_config(path):
            recipe = recipe_of_run(path)
            return cls(path=path, model=recipe.model, recipe=recipe, by_transformers=False, is_run=True)
        config = read_config(path)
        kind = str(config.get("model_type"))
        found = read_exported(path)
        recipe = Recipe(model=found.model, data=found.data)
        theirs = kind in WHOLE_MODELS or kind == DEEPSTACK or (kind == "llava" and "text_config" in config)
        return cls(path=path, model=found.model, recipe=recipe, by_transformers=theirs, is_run=False)

    @property
    def who(self) -> str:
        """Who computes it."""
        return "transformers" if self.by_transformers else "this system"


def check_conversion(
    source: Path, target: Path, pictures: Sequence[Path] = (), *, seed: int = 0, pool: RankPool | None = None
) -> Iterator[ParityLine]:
    """Compare what two folders compute.

    Args:
        source: A folder that `convert` reads.
        target: What it was converted into: a folder, or a run folder.
        pictures: Files of pictures that are asked about, beside drawn ones.
        seed: What questions are drawn from.
        pool: One rank that is there already; without it, one is started and ended.

    Yields:
        A line for each quantity as it comes: pixels of all pictures, logits of each question, and how many of the
        tokens that follow it differ.

    Raises:
        CheckpointError, ConfigError: A folder is not understood, or it cannot be asked about given pictures.
        DataError: A picture cannot be read.
        ParityError: After the last line, if a quantity exceeds its tolerance.
    """
    first, second = Side.of(source), Side.of(target)
    questions = _questions(first, pictures, seed)
    failed = 0
    with ExitStack() as opened:
        ranks = pool
        if pool is None and not (first.by_transformers and second.by_transformers):
            ranks = opened.enter_context(RankPool(1))
        ours = _computed(first, questions, NUM_NEW_TOKENS, ranks)
        longer = [
            replace(one, sample=_continued(one.sample, found.new_tokens))
            for one, found in zip(questions, ours, strict=True)
        ]
        theirs = _computed(second, longer, 0, ranks)
    for line in _lines(first, second, questions, ours, theirs):
        failed += not line.passed
        yield line
    if failed:
        raise ParityError(f"{source} and {target}: {failed} quantities exceed their tolerances")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Computed:
    """What one side makes of a question."""

    logits: torch.Tensor
    """(T, vocabulary of text)."""
    new_tokens: tuple[int, ...]
    pixels: tuple[np.ndarray, ...]
    """Per picture (views, 3, S, S) normalised; empty for drawn views."""


def _computed(side: Side, questions: Sequence[Question], num_new: int, ranks: RankPool | None) -> list[Computed]:
    if side.by_transformers:
        found = by_own_code(side.path, side.model, [(one.sample, one.pictures) for one in questions], num_new)
        return [Computed(logits=logits, new_tokens=new, pixels=pixels) for logits, new, pixels in found]
    assert ranks is not None
    samples = [_prepared(one, side.recipe) for one in questions]
    weights = Weights(path=side.path, recipe=side.recipe, is_run=side.is_run)
    answers = ranks.run(answers_on_rank, weights, samples, num_new)[0]
    return [
        Computed(logits=logits, new_tokens=new, pixels=_normalised(sample, side.model) if one.pictures else ())
        for one, sample, (logits, new) in zip(questions, samples, answers, strict=True)
    ]


def _prepared(question: Question, recipe: Recipe) -> DrawnSample:
    """The sample with the views that a recipe makes of the pictures."""
    if not question.pictures:
        return question.sample
    made = [Processor.of(recipe).process(content) for content in question.pictures]
    shapes = tuple((int(one.grid[0]), int(one.grid[1])) for one in made)
    return replace(question.sample, shapes=shapes, pixels=tuple(one.slots for one in made))


def _normalised(sample: DrawnSample, model: ModelConfig) -> tuple[np.ndarray, ...]:
    mean, std = (np.array(value, np.float64) for value in (model.vision.mean, model.vision.std))
    return tuple(((views / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32) for views in sample.pixels)


def _continued(sample: DrawnSample, new: Sequence[int]) -> DrawnSample:
    tokens = np.concatenate([sample.tokens, np.array(new, np.int64)])
    return replace(sample, tokens=tokens, loss_mask=np.ones_like(tokens))


def _questions(side: Side, pictures: Sequence[Path], seed: int) -> list[Question]:
    config = read_config(side.path)
    if side.model.variant.traits.whole_model is not None:
        if pictures:
            raise ConfigError(
                [f"--picture: views of {side.model.variant} are drawn, and pictures are not read; leave it out"]
            )
        forbidden = special_tokens(side.model, config, str(side.path / CONFIG))
        samples = draw_samples(side.model, forbidden, seed)
        return [Question(sample=one) for one in samples if not one.name.startswith("video")]
    rng, size = np.random.default_rng(seed), side.model.vision.image_size
    drawn = [_png(width * size, height * size, seed + k) for k, (width, height) in enumerate(((3, 2), (1, 3), (2, 2)))]
    images = {int(value) for key, value in config.items() if key.startswith("image_token") and isinstance(value, int)}
    ids = np.setdiff1d(np.arange(side.model.language.vocab_size), np.array(sorted(images), np.int64))
    wanted: list[tuple[str, tuple[bytes, ...]]] = [
        ("one drawn picture", (drawn[0],)),
        ("two drawn pictures", (drawn[1], drawn[2])),
        ("text alone", ()),
        *((f"the picture {path}", (_content(path),)) for path in pictures),
    ]
    return [_question(side, name, contents, ids, rng) for name, contents in wanted]


def _question(
    side: Side, name: str, contents: tuple[bytes, ...], ids: np.ndarray, rng: np.random.Generator
) -> Question:
    tokens = [rng.choice(ids, 3)]
    for _ in contents:
        tokens += [np.array([IMAGE_TOKEN_ID]), rng.choice(ids, 4)]
    joined = np.concatenate(tokens).astype(np.int64)
    bare = DrawnSample(name=name, tokens=joined, loss_mask=np.ones_like(joined), shapes=(), pixels=())
    question = Question(sample=bare, pictures=contents)
    return replace(question, sample=_prepared(question, side.recipe))


def _png(width: int, height: int, seed: int) -> bytes:
    stream = io.BytesIO()
    draw_photo(width, height, seed).save(stream, "PNG")
    return stream.getvalue()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"--picture {path}: cannot be read: {error.strerror or error}; name a file") from error


def _lines(
    first: Side, second: Side, questions: Sequence[Question], ours: Sequence[Computed], theirs: Sequence[Computed]
) -> Iterator[ParityLine]:
    by = f"{first.path} by {first.who}, {second.path} by {second.who}"
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a.pixels, b.pixels, strict=True)]
    if pairs:
        worst = max(_largest(a, b) for a, b in pairs)
        yield ParityLine(f"pixels of {len(pairs)} pictures ({by})", worst, PIXELS_TOLERANCE)
    for question, a, b in zip(questions, ours, theirs, strict=True):
        length, name = len(a.logits), question.sample.name
        width = min(a.logits.shape[1], b.logits.shape[1])
        error = relative_error(b.logits[:length, :width], a.logits[:, :width], floor=1.0)
        yield ParityLine(f"logits of {name}", error, LOGITS_TOLERANCE)
        others = _differing(b.logits[length - 1 :, :width], a.new_tokens)
        yield ParityLine(f"next tokens of {name} that differ, of {len(a.new_tokens)}", others, 0)


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def _differing(logits_TV: torch.Tensor, tokens: Sequence[int]) -> int:
    """Positions where another token is likelier than the one that follows, by more than rounding."""
    slack = 2 * LOGITS_TOLERANCE * max(1.0, float(logits_TV.abs().max()))
    return sum(
        not float(row.max() - row[token]) <= slack for row, token in zip(logits_TV[: len(tokens)], tokens, strict=True)
    )
