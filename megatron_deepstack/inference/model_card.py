"""What a model card says of a run: its data, its scores and its recipe. Paths are left out but for their last name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_deepstack.config.build import plain
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.yaml_text import write_yaml
from megatron_deepstack.data.location import Location
from megatron_deepstack.run_folder.answers import Score, read_answer_sets
from megatron_deepstack.run_folder.recipe import DATA_PATHS, EVALUATION_PATHS, TRAIN_PATHS


def card_of_run(recipe: Recipe) -> list[str]:
    """The paragraphs of a model card about a run.

    Args:
        recipe: The run's recipe.

    Returns:
        Markdown paragraphs: data, scores if `generate` has answered questions, and the recipe.

    Raises:
        DataError: A file of answers is damaged.
    """
    told = {name: value for name, value in _without_folders(plain(recipe)).items() if name != "run_dir"}
    data = [value for name in ("records", "store", "stores") for value in _listed(told["data"].get(name))]
    scores = [f"- {found.title}: {Score.of(found.answers).words}" for found in _answered(recipe)]
    return [
        f"## Data\n\n{', '.join(data) or 'not named in the recipe'}",
        *(["## Scores\n\n" + "\n".join(scores)] if scores else []),
        f"## Recipe\n\n```yaml\n{write_yaml(told).strip()}\n```",
    ]


def _answered(recipe: Recipe) -> list[Any]:
    return [found for found in read_answer_sets(Path(recipe.run_dir)) if Score.of(found.answers).total]


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    for section, names in (("data", DATA_PATHS), ("train", TRAIN_PATHS), ("evaluation", EVALUATION_PATHS)):
        for name in names:
            recipe[section][name] = _last_names(recipe[section].get(name))
    return recipe


def _last_names(value: Any) -> Any:
    if isinstance(value, str):
        return Location.parse(value).name
    if isinstance(value, list):
        return [_last_names(item) for item in value]
    if isinstance(value, dict):
        return {name: _last_names(item) for name, item in value.items()}
    return value


def _listed(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, list):
        return [name for item in value for name in _listed(item)]
    return [value] if isinstance(value, str) else []
