"""A summary of the recipes in the package: what each is for, its model, and the machines it was made for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from megatron_deepstack.config.load import RECIPES, load_recipe
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.budget.parameters import model_parameters
from megatron_deepstack.planning.check import model_ranks

_MADE_FOR: Final = re.compile(r"([A-Z][\w-]+ H100|two processes without a GPU)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shipped:
    """The summary of one recipe of the package."""

    name: str
    """Name under which it can be loaded."""
    about: str
    """The first sentence of its file."""
    variant: str
    parameters: int
    """Number of parameters of the whole model."""
    made_for: str
    """Machines for which its layout was chosen, in the words of its file; empty if the file names none."""
    layout: str
    """Number of ranks of one replica on each axis, such as `TP 2 x PP 4`."""
    ranks_per_replica: int


def shipped_recipes() -> list[Shipped]:
    """Load all recipes of the package and summarise them, in the order of their names."""
    return [_shipped(file.stem) for file in sorted(RECIPES.glob("*.yaml"))]


def _shipped(name: str) -> Shipped:
    recipe = load_recipe(name)
    words = _opening_comment(name)
    made_for = _MADE_FOR.search(words)
    return Shipped(
        name=name,
        about=re.split(r"[.;](?= |$)", words, maxsplit=1)[0],
        variant=str(recipe.model.variant),
        parameters=sum(model_parameters(recipe.model).values()),
        made_for=made_for[0] if made_for else "",
        layout=_layout(recipe),
        ranks_per_replica=model_ranks(recipe.parallel),
    )


def _opening_comment(name: str) -> str:
    """Return the comment at the top of a recipe's file as one text."""
    lines = []
    for line in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _layout(recipe: Recipe) -> str:
    parallel = recipe.parallel
    axes = (("TP", parallel.tensor), ("PP", parallel.pipeline), ("CP", parallel.context), ("EP", parallel.expert))
    return " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one rank"
