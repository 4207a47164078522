"""Comparison of our preprocessing with data the published implementation produced: views and conversations.

Both must be equal, byte for byte and id for id. The formats are those of the reference folder: `crops.npz` with
`crops.json` beside it, and a JSON of conversations with their token ids and labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_deepstack.config.choices import GridRule, ImageResize
from megatron_deepstack.data.images.pictures import decode_image, make_views
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.text.conversation import encode_conversation
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError, DeepStackError, ParityError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.views import ViewLayout, pick_grid

_MODES: Final = {
    "bestgrid": (GridRule.BEST_FIT, ViewLayout.CROPS),
    "2xsample": (GridRule.FIXED_2X2, ViewLayout.CROPS),
    "anyres": (GridRule.BEST_FIT, ViewLayout.HIGH_RES),
}
_NUM_CROPS: Final = 4
"""Published limit of crops; a case may state another as `num_crops`."""
_MAX_PIXELS: Final = 178_956_970


@dataclass(frozen=True, slots=True)
class CaseOutcome:
    """Result of one case."""

    case: str
    problem: str | None
    """Where it differs first; None if it is equal."""
    detail: str

    def __str__(self) -> str:
        return f"{'equal ' if self.problem is None else 'DIFFERS'} {self.case}: {self.problem or self.detail}"


def check_crops(folder: str | Path, photos: str | Path) -> list[CaseOutcome]:
    """Compare the views of every case with ours.

    Args:
        folder: Holds `crops.npz` and `crops.json`.
        photos: Folder of the pictures that the cases name.

    Returns:
        One line for each case; all are equal.

    Raises:
        ParityError: A case differs; the message holds all lines.
        DataError: The folder is not in the expected format.
    """
    settings = _read_json(Path(folder) / "crops.json")
    if not isinstance(settings, dict) or not settings:
        raise DataError(
            f"{Path(folder) / 'crops.json'}: holds no cases; an object with one entry per case was expected"
        )
    path = Path(folder) / "crops.npz"
    try:
        with np.load(path) as views:
            lines = [_check_views(case, settings[case], views, Path(photos)) for case in settings]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not in the expected format: {type(error).__name__}: {error}") from error
    return _all_equal(lines, f"cases of {folder}")


def check_conversations(file: str | Path, tokenizer: str | Path) -> list[CaseOutcome]:
    """Compare token ids and labels of every conversation with ours.

    Args:
        file: JSON with the conversations and what the published code makes of them.
        tokenizer: The SentencePiece model that it used.

    Returns:
        One line for each conversation; all are equal.

    Raises:
        ParityError: A conversation differs; the message holds all lines.
        DataError: The file is not in the expected format.
    """
    document = _read_json(Path(file))
    samples = document.get("samples") if isinstance(document, dict) else None
    if not samples:
        raise DataError(f"{file}: holds no `samples`; a list of conversations with input_ids and labels was expected")
    model = load_tokenizer(tokenizer)
    try:
        lines = [_check_conversation(sample, model) for sample in samples]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: a sample is not in the expected format: {type(error).__name__}: {error}") from error
    return _all_equal(lines, f"conversations of {file}")


def _check_conversation(sample: Mapping[str, Any], tokenizer: Tokenizer) -> CaseOutcome:
    case, turns = str(sample["id"]), [Turn(Role(turn["from"]), turn["value"]) for turn in sample["conversations"]]
    try:
        tokens, mask = encode_conversation(turns, sample["version"], tokenizer)
    except DeepStackError as error:
        return CaseOutcome(case, str(error), "")
    labels = np.where(mask == 1, tokens, IGNORE_INDEX)
    problem = _first_difference("token", tokens.tolist(), sample["input_ids"])
    problem = problem or _first_difference("label", labels.tolist(), sample["labels"])
    return CaseOutcome(case, problem, f"{len(tokens)} tokens, {int(mask.sum())} of them learned")


def _check_views(case: str, settings: Mapping[str, Any], views: Mapping[str, np.ndarray], photos: Path) -> CaseOutcome:
    mode = case.rpartition(".")[2]
    if mode not in _MODES or case not in views:
        raise DataError(f"case {case}: its name must end in one of {', '.join(_MODES)} and be an array of crops.npz")
    rule, layout = _MODES[mode]
    crop_size, num_crops = int(settings["crop_size"]), int(settings.get("num_crops", _NUM_CROPS))
    try:
        pixels = decode_image((photos / settings["file"]).read_bytes(), _MAX_PIXELS).pixels
    except OSError as error:
        raise DataError(f"{photos / settings['file']}: cannot be read: {error.strerror}") from error
    except QuarantineError as error:
        return CaseOutcome(case, f"{settings['file']}: {error}", "")
    height, width = pixels.shape[:2]
    grid = pick_grid(rule, width, height, crop_size, num_crops)
    ours = make_views(pixels, grid, layout, crop_size, ImageResize.PILLOW).transpose(0, 3, 1, 2)
    detail = f"{len(ours)} views of {crop_size} pixels, grid {grid[0]}x{grid[1]}"
    return CaseOutcome(case, _view_difference(ours, views[case], grid, tuple(settings["grid"])), detail)


def _view_difference(
    ours: np.ndarray, theirs: np.ndarray, grid: tuple[int, ...], expected: tuple[int, ...]
) -> str | None:
    if grid != expected:
        return f"grid {grid}, expected {expected}"
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, expected {theirs.shape}"
    distance = np.abs(ours.astype(np.int16) - theirs.astype(np.int16))
    if not distance.any():
        return None
    view, channel, y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return (
        f"{np.count_nonzero(distance)} of {distance.size} values, by at most {distance.max()} "
        f"(view {view}, channel {channel}, row {y}, column {x})"
    )


def _first_difference(noun: str, ours: list[int], theirs: list[int]) -> str | None:
    if ours == theirs:
        return None
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return f"{noun} {position} is {mine}, expected {other}"
    return f"{len(ours)} {noun}s, expected {len(theirs)}"


def _all_equal(lines: list[CaseOutcome], what: str) -> list[CaseOutcome]:
    differing = [line for line in lines if line.problem is not None]
    if differing:
        listed = "\n".join(str(line) for line in lines)
        raise ParityError(f"{listed}\n{len(differing)} of {len(lines)} {what} differ from the published preprocessing")
    return lines


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
