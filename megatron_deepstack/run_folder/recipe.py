"""Reading the recipe of a run from its folder, from any current folder.

A recipe may hold relative paths. They are relative to the folder in which the run was started, and not to the folder in
which `generate` or `report` is called. There are two ways to find that folder. If the path of the run folder ends with
the recipe's relative `run_dir`, it is the folder in front of that ending, also after both were moved together.
Otherwise `train` has written its path into a file in the run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from megatron_deepstack.config.load import load_recipe, override_recipe
from megatron_deepstack.config.problems import Problem, raise_problems
from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.files.write_whole import write_whole

SectionT = TypeVar("SectionT")
DATA_PATHS: Final = ("records", "images", "tokenizer", "store", "stores", "validation_store", "cache_dir")
"""Fields of `data` that hold one or several paths."""
TRAIN_PATHS: Final = ("init_from",)
"""Fields of `train` that hold one or several paths."""
EVALUATION_PATHS: Final = ("store", "file", "images")
"""Fields of `evaluation` that hold a path."""


def require_run(run: str | Path) -> Path:
    """Return the file of the recipe in a run folder.

    Raises:
        ConfigError: There is no such folder, or no recipe in it. Every command that takes a RUN gives this message.
    """
    file, above = RunFolder(run).recipe, run_around(run)
    if file.is_file() and above is None:
        return file
    where = "" if Path(run).is_absolute() else f" (looked in {Path.cwd()})"
    if above is not None:
        what, where = in_the_run(above), ""
    elif Path(run).is_file():
        what, where = "is a file", ""
    elif Path(run).is_dir():
        what = f"holds no {RECIPE_FILE}"
    else:
        what = f"holds no {RECIPE_FILE}, since no such folder is there"
    raise ConfigError([f"{run}: {what}{where}; expected the run_dir of a `train` or `launch`"])


def run_around(path: str | Path) -> Path | None:
    """The run in whose folder a path lies, such as that of one of its checkpoints, which hold a recipe too.

    Args:
        path: Any path; the folder of a run is not inside itself.

    Returns:
        The run's folder; None if the path lies in no run.
    """
    here = Path(path).absolute()
    if RunFolder(here.parent.parent).checkpoints == here.parent and RunFolder(here.parent.parent).recipe.is_file():
        return here.parent.parent
    if RunFolder(here).recipe.is_file():
        return None
    return next((parent for parent in here.parents if RunFolder(parent).recipe.is_file()), None)


def in_the_run(above: Path) -> str:
    """What a message says of a path in a run's folder, where a run is expected."""
    return f"lies in the run {above}; name that run, whose newest checkpoint is taken"


def recipe_of_run(run: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a run and apply overrides to it.

    Args:
        run: The run folder. It may have been moved, and its name may be one that YAML would read as another value.
        overrides: Each `section.field=value`. Relative paths in them are relative to the current folder.

    Returns:
        The recipe. Its `run_dir` is `run`, and relative paths of the run's recipe have been made absolute.

    Raises:
        ConfigError: There is no run, or the overrides are wrong.
    """
    own, problems = override_recipe(_own_recipe(run), overrides)
    raise_problems(problems)
    return replace(own, run_dir=str(run))


def checkable_recipe_of_run(run: str | Path, overrides: Sequence[str]) -> tuple[Recipe, list[Problem]]:
    """Read the recipe as `recipe_of_run` does, but return the problems, so that a caller can add others to them.

    Args:
        run: The run folder.
        overrides: Each `section.field=value`.

    Returns:
        The recipe, and the problems that it has with the overrides.

    Raises:
        ConfigError: There is no run in that folder.
    """
    recipe, problems = override_recipe(_own_recipe(run), overrides)
    return replace(recipe, run_dir=str(run)), problems


def _own_recipe(run: str | Path) -> Recipe:
    """Read the run's recipe without overrides, and make its relative paths absolute."""
    recipe = load_recipe(require_run(run))
    bases = start_folders(run, recipe.run_dir)
    data = {name: _placed(getattr(recipe.data, name), bases) for name in DATA_PATHS}
    train = {name: _placed(getattr(recipe.train, name), bases) for name in TRAIN_PATHS}
    asked = {name: _placed(getattr(recipe.evaluation, name), bases) for name in EVALUATION_PATHS}
    return replace(
        recipe,
        data=_with(recipe.data, data),
        train=_with(recipe.train, train),
        evaluation=_with(recipe.evaluation, asked),
    )


def _with(section: SectionT, changes: Mapping[str, Any]) -> SectionT:
    """The section with other values of some of its fields."""
    return replace(section, **changes)  # type: ignore[type-var]


def record_start_folder(run: Path) -> None:
    """Write the path of the current folder into the run folder.

    Call it on one rank only, when a run starts whose relative paths are relative to the current folder.
    """
    write_whole(RunFolder(run).started_in, f"{Path.cwd()}\n")


def start_folders(run: str | Path, recorded_run_dir: str) -> list[Path]:
    """Return the folders to which the run's relative paths may refer.

    Args:
        run: The present path of the run folder.
        recorded_run_dir: `run_dir` of its recipe.

    Returns:
        The folders, the most likely first and the current folder last; at least one.
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
    """Make a path, or each path of a tuple, absolute; URLs, absolute paths and paths with `~` are not changed."""
    if isinstance(value, tuple):
        return tuple(_placed(item, bases) for item in value)
    if not isinstance(value, str) or "://" in value or value.startswith("~") or Path(value).is_absolute():
        return value
    there = (base / value for base in bases)
    return str(next((path for path in there if path.exists()), bases[0] / value))
