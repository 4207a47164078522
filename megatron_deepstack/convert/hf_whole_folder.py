"""How a folder of a whole model of transformers prepares data: its processor's files, and its chat template.

The processor's values are those that an export writes (`hf_processors`), so a folder is read by them too: what a recipe
can say becomes its fields, and everything else must be as computed here, or is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.build import build_recipe
from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import DataConfig, ModelConfig
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.chat_template import chat_template
from megatron_deepstack.convert.hf_facts import PREPROCESSOR, PROCESSOR
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.convert.hf_processors import VIDEO_PREPROCESSOR
from megatron_deepstack.convert.hf_whole import WholeModel, whole_model_of
from megatron_deepstack.errors import CheckpointError

_TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATE_HOLDERS: Final = ("chat_template.json", "tokenizer_config.json")
"""JSON files that hold a chat template where it has no file of its own."""
_NAMES: Final = frozenset({"processor_class", "image_processor_type"})
_FILLING: Final = ("do_center_crop", "do_pad")
"""Steps that are left out where a processor of ours does not name them."""
_OF_VIEWS: Final = ("min_pixels", "max_pixels")


def described_whole(folder: Path, said: Mapping[str, Any]) -> tuple[ModelConfig, DataConfig, frozenset[str]]:
    """Read model and data of such a folder.

    Args:
        folder: The folder; its config.json has the `model_type` of a whole model.
        said: Fields of `data` that its config.json holds, if `export` wrote it.

    Returns:
        The model, how data is prepared, and the names of the fields of `data` that the folder says.

    Raises:
        CheckpointError: The config describes something that is not computed here, or pictures are prepared otherwise.
    """
    model = model_of_folder(folder)
    found = whole_model_of(model.variant)
    assert found is not None
    whole = found[1]
    file, image = _section(folder, PREPROCESSOR, "image_processor")
    _, video = _section(folder, VIDEO_PREPROCESSOR, "video_processor")
    values = {**dict(_of_images(image, model)), **dict(_of_videos(video, model)), **said}
    template = _known_template(folder, whole)
    if template is not None:
        values.setdefault("template", str(template))
    data = _built({"template": str(whole.template), **values}, file)
    vision = replace(model.vision, mean=_colour(image, "image_mean", file) or model.vision.mean)
    model = replace(model, vision=replace(vision, std=_colour(image, "image_std", file) or vision.std))
    differences = list(_differences(image, whole.processor(model, data)[PREPROCESSOR]))
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(f"{file}: prepares pictures otherwise than the model is trained on here:\n  {listed}")
    return model, data, frozenset(values)


def folder_template(folder: Path) -> str | None:
    """Return the text of a folder's chat template; None if it has none.

    Args:
        folder: A folder of transformers.

    Raises:
        CheckpointError: A file that may hold one is not JSON.
    """
    file = folder / _TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    held = (read_beside(folder / name).get("chat_template") for name in _TEMPLATE_HOLDERS)
    return next((text for text in held if isinstance(text, str)), None)


def _known_template(folder: Path, whole: WholeModel) -> Template | None:
    """The template that `export` has written into a folder."""
    text = folder_template(folder)
    for known in Template:
        if text == chat_template(known, image_token=whole.image_token, video_token=whole.video_token):
            return known
    return None


def _section(folder: Path, name: str, nested: str) -> tuple[Path, Mapping[str, Any]]:
    """The values of a processor and their file: newer folders hold them in one file, which counts if both are there."""
    inside = read_beside(folder / PROCESSOR).get(nested)
    if isinstance(inside, Mapping):
        return folder / PROCESSOR, inside
    return folder / name, read_beside(folder / name)


def read_beside(file: Path) -> Mapping[str, Any]:
    """Read a JSON file that stands beside weights and may be absent.

    Args:
        file: The file.

    Returns:
        Its object; empty where there is no file, or where it holds something else.

    Raises:
        CheckpointError: The file cannot be read as JSON.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    return found if isinstance(found, Mapping) else {}


def _of_images(image: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[str, Any]]:
    if not tower_of(model.vision).is_native:
        return
    size = image.get("size")
    edges = size if isinstance(size, Mapping) else {}
    for name, edge in zip(_OF_VIEWS, ("shortest_edge", "longest_edge"), strict=True):
        value = image.get(name) or edges.get(edge)
        if value is not None:
            yield name, value


def _of_videos(video: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[str, Any]]:
    if not tower_of(model.vision).is_native:
        return
    size = video.get("size")
    edges = size if isinstance(size, Mapping) else {}
    for name, value in (
        ("video_min_pixels", edges.get("shortest_edge")),
        ("video_max_pixels", edges.get("longest_edge")),
        ("video_fps", video.get("fps")),
        ("video_max_frames", video.get("max_frames")),
    ):
        if value is not None:
            yield name, value


def _colour(image: Mapping[str, Any], key: str, file: Path) -> tuple[float, float, float] | None:
    """A number for each channel; None where the file does not say it."""
    value = image.get(key)
    if value is None:
        return None
    numbers = [one for one in value if isinstance(one, int | float)] if isinstance(value, list) else []
    if len(numbers) != 3 or len(value) != 3 or (key == "image_std" and min(numbers) <= 0):
        raise CheckpointError(f"{file}: {key}: found {value!r}, expected a number for each of red, green and blue")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _built(values: Mapping[str, Any], file: Path) -> DataConfig:
    problems: list[Problem] = []
    data = build_recipe({"data": dict(values)}, problems).data
    if problems:
        told = "; ".join(f"{', '.join(problem.paths)}: {problem.text}" for problem in problems)
        raise CheckpointError(f"{file}: prepares data as a recipe cannot: {told}")
    return data


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key, value in theirs.items():
        mine = ours.get(key)
        if key == "image_processor_type" and _kind(value) != _kind(mine):
            yield f"{key}: found {value!r}, computed is {mine!r}"
        elif key in _FILLING and key not in ours and value:
            yield f"{key}: found {value!r}, computed is False"
        elif key in ours and key not in _NAMES and value is not None and not _equal(key, value, mine):
            yield f"{key}: found {value!r}, computed is {mine!r}"


def _kind(name: Any) -> str:
    """The name of a processor without what says by which library it computes."""
    return str(name).removesuffix("Fast").removesuffix("Pil")


def _equal(key: str, value: Any, mine: Any) -> bool:
    if isinstance(value, float) and isinstance(mine, float):
        return math.isclose(value, mine, rel_tol=1e-9)
    if key in ("size", "crop_size") and isinstance(mine, Mapping) and set(mine) == {"height", "width"}:
        side = mine["height"]
        return value in (mine, side, {"shortest_edge": side})
    if key == "size" and isinstance(mine, Mapping) and isinstance(value, Mapping):
        return value.keys() <= mine.keys()  # areas, which are the recipe's own fields
    return bool(value == mine)
