"""What `ask` and `evaluate` are given: a run, or a folder of weights. They are told apart without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.check import checked
from megatron_deepstack.run_folder.recipe import checkable_recipe_of_run, in_the_run, run_around

WEIGHTS_CONFIG: Final = "config.json"
"""File by which a folder of weights is known."""
_EXPECTED: Final = (
    f"expected the run_dir of a `train` or `launch` (with {RECIPE_FILE}), or a folder of weights as `export` writes it "
    f"(with {WEIGHTS_CONFIG})"
)
_SHOWN: Final = 6
"""Names that a message lists."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run; if it is none, it is a folder of weights.

    Args:
        path: The folder.

    Returns:
        True for a run.

    Raises:
        ConfigError: It is neither; the message says what it is, and what to name instead.
    """
    if RunFolder(path).recipe.is_file() and run_around(path) is None:
        return True
    if (path / WEIGHTS_CONFIG).is_file():
        return False
    raise ConfigError([f"{path}: {_what_it_is(path)}; {_EXPECTED}"])


def check_asked(path: Path, overrides: Sequence[str]) -> None:
    """Say what is wrong with a run's recipe, or with the folder itself, at once: before heavy imports.

    Args:
        path: The folder.
        overrides: Changes to a recipe, each `section.field=value`; those of a folder of weights are checked later.

    Raises:
        ConfigError: The folder is neither a run nor weights, or the recipe has problems.
    """
    if is_run(path):
        checked(*checkable_recipe_of_run(path, overrides))


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "no such folder" + ("" if path.is_absolute() else f" (looked in {Path.cwd()})")
    if not path.is_dir():
        return "is a file"
    above = run_around(path)
    if above is not None:
        return in_the_run(above)
    if path.name.endswith(".partial"):
        return "an export that is being written, or whose writing was cut off; wait until it has its own name"
    if (path / "adapter_config.json").is_file():
        return "holds adapters alone; name the run that they are of, or a folder with all weights"
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return f"holds weights, and no {WEIGHTS_CONFIG} that says what they compute; complete the folder"
    below = sorted(one.parent.name for one in path.glob(f"*/{RECIPE_FILE}"))
    return f"the runs {', '.join(below[:_SHOWN])} lie in it; name one of them" if below else "holds neither"
