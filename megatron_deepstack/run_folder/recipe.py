"""The recipe of a run, read from its folder, from wherever the command is started.

A recipe may hold relative paths. They count from the folder in which the run was started, not from the one in which
`generate` or `report` is typed. That folder is found in two ways: a relative `run_dir` that the run folder's own path
ends with (which survives moving both together), and a line that `train` leaves in the run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.load import load_recipe, override_recipe
from megatron_deepstack.config.problems import Problem, raise_problems
from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder
from megatron_deepstack.config.schema import DataConfig, Recipe, TrainConfig
from megatron_deepstack.errors import ConfigError

DATA_PATHS: Final = ("records", "images", "tokenizer", "store", "stores", "validation_store", "cache_dir")
"""Fields of `data` that hold a path or several."""
TRAIN_PATHS: Final = ("init_from",)
"""The same of `train`."""


def require_run(run: str | Path) -> Path:
    """The recipe's file in a run folder.

    Raises:
        ConfigError: There is no such folder, or no recipe in it. Every verb that takes a RUN says it in these words.
    """
    file = RunFolder(run).recipe
    if file.is_file():
        return file
    where = "" if Path(run).is_absolute() else f" (looked in {Path.cwd()})"
    what = f"holds no {RECIPE_FILE}" if Path(run).is_dir() else f"holds no {RECIPE_FILE}, since no such folder is there"
    raise ConfigError([f"{run}: {what}{where}; expected the run_dir of a `train` or `launch`"])


def recipe_of_run(run: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was made with, with overrides on top.

    Args:
        run: The run folder. It may have been moved, and its name may mean something else to YAML.
        overrides: `section.field=value`; relative paths in them count from the current folder.

    Returns:
        The recipe; `run_dir` is `run`, and relative paths of the run's own recipe are absolute.

    Raises:
        ConfigError: There is no run, or the overrides are wrong.
    """
    own, problems = override_recipe(_own_recipe(run), overrides)
    raise_problems(problems)
    return replace(own, run_dir=str(run))


def checkable_recipe_of_run(run: str | Path, overrides: Sequence[str]) -> tuple[Recipe, list[Problem]]:
    """As `recipe_of_run`, but problems of the overrides are returned, for a caller that adds its own."""
    recipe, problems = override_recipe(_own_recipe(run), overrides)
    return replace(recipe, run_dir=str(run)), problems


def _own_recipe(run: str | Path) -> Recipe:
    """The run's own recipe, its relative paths made absolute."""
    recipe = load_recipe(require_run(run))
    bases = start_folders(run, recipe.run_dir)
    data = {name: _placed(getattr(recipe.data, name), bases) for name in DATA_PATHS}
    train = {name: _placed(getattr(recipe.train, name), bases) for name in TRAIN_PATHS}
    changed: tuple[DataConfig, TrainConfig] = (replace(recipe.data, **data), replace(recipe.train, **train))
    return replace(recipe, data=changed[0], train=changed[1])


def record_start_folder(run: Path) -> None:
    """Leave the current folder's path in the run folder. Call on one rank, where the run's own paths are relative to
    the current folder."""
    RunFolder(run).started_in.write_text(f"{Path.cwd()}\n", encoding="utf-8")


def start_folders(run: str | Path, recorded_run_dir: str) -> list[Path]:
    """Folders that relative paths of the run may count from, the likeliest first; the current one comes last.

    Args:
        run: Where the run folder lies now.
        recorded_run_dir: `run_dir` of its recipe.
    """
    return list(dict.fromkeys(_start_folders(Path(run), Path(recorded_run_dir))))


def _start_folders(run: Path, recorded: Path) -> Iterator[Path]:
    parts = [part for part in recorded.parts if part != "."]
    here = run.resolve()
    if not recorded.is_absolute() and parts and ".." not in parts and here.parts[-len(parts) :] == tuple(parts):
        yield Path(*here.parts[: -len(parts)])
    with suppress(OSError, UnicodeDecodeError):
        yield Path(RunFolder(run).started_in.read_text(encoding="utf-8").strip())
    yield Path.cwd()


def _placed(value: Any, bases: Sequence[Path]) -> Any:
    """A path, or a tuple of them, made absolute; URLs, absolute paths and `~` are left as they are."""
    if isinstance(value, tuple):
        return tuple(_placed(item, bases) for item in value)
    if not isinstance(value, str) or "://" in value or value.startswith("~") or Path(value).is_absolute():
        return value
    there = (base / value for base in bases)
    return str(next((path for path in there if path.exists()), bases[0] / value))
