"""Towers and families that other installed packages add, so that the command line and every rank know them.

A package names a function under the entry-point group `megatron_deepstack.parts`; the function calls `register_tower`
or `register_family`. It is called once in a process, when a recipe uses a name that is not known otherwise.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Final

from megatron_deepstack.errors import ConfigError

GROUP: Final = "megatron_deepstack.parts"
"""Entry-point group under which packages name their function."""


@cache
def load_installed_parts() -> None:
    """Call the functions that installed packages name. Further calls in the same process do nothing.

    Raises:
        ConfigError: A package's function cannot be imported, or fails.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()()
        except ConfigError:
            raise
        except Exception as error:
            package = "a package" if entry.dist is None else f"the package {entry.dist.name}"
            raise ConfigError(
                [
                    f"{package} adds towers or decoder families by {entry.value} (entry point {entry.name} of "
                    f"{GROUP}), which fails: {type(error).__name__}: {error}; repair or remove the package"
                ]
            ) from error
