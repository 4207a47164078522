"""Write the resolved text of every published recipe to tests/recipes/golden. `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_deepstack.config.load import RECIPES, load_recipe, recipe_to_yaml

GOLDEN = Path(__file__).parent.parent / "tests" / "recipes" / "golden"


def published_recipes() -> list[str]:
    """Names of the recipes that follow the paper, of the baselines it compares with, and of other models that stack."""
    kinds = ("deepstack", "baseline", "qwen3_vl", "granite4_vision")
    return sorted(file.stem for kind in kinds for file in RECIPES.glob(f"{kind}_*.yaml"))


def main() -> int:
    """Number of files that differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where something differs")
    check_only = parser.parse_args().check
    stale = []
    for name in published_recipes():
        file, text = GOLDEN / f"{name}.yaml", recipe_to_yaml(load_recipe(name))
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check_only:
                file.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(stale)} of {len(published_recipes())} changed: {', '.join(stale) or 'none'}\n")
    return len(stale) if check_only else 0


if __name__ == "__main__":
    sys.exit(main())
