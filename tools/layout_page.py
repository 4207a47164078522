"""Write docs/layout.md: every source file with the first line of its docstring. `--check` only compares."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layout.md"
_HEAD = """# Layout

Every source file with the first line of its docstring. Written by `python tools/layout_page.py`.

"""
_OTHERS = {
    "docs/": "guides, architecture, generated pages",
    "examples/": "recipes for your own data",
    "Makefile": "setup, demo, test, lint",
    "constraints.txt": "exact versions that are tested together",
    "pyproject.toml": "settings of ruff, mypy and pytest",
    "setup.py": "what is installed, and what it needs",
    "recipes/*.yaml": "whole runs",
    "tests/": "mirrors the code; real processes, no network",
}
_COLUMN = 34


def tree() -> str:
    """The tree as text, one line a folder or file."""
    lines = []
    for top in ("megatron_deepstack", "orchestration", "tools"):
        lines += _folder(ROOT / top, 0)
    lines += [_line(name, _OTHERS[name]) for name in ("tests/", "docs/", "examples/")]
    lines += [_line(name, _OTHERS[name]) for name in ("Makefile", "setup.py", "constraints.txt", "pyproject.toml")]
    return "\n".join(lines) + "\n"


def _folder(folder: Path, depth: int) -> list[str]:
    init = folder / "__init__.py"
    lines = [_line("  " * depth + f"{folder.name}/", _says(init) if init.is_file() else "")]
    for entry in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if entry.is_dir() and any(entry.rglob("*.py")):
            lines += _folder(entry, depth + 1)
        elif entry.suffix == ".py" and entry.name != "__init__.py":
            lines.append(_line("  " * (depth + 1) + entry.name, _says(entry)))
        elif entry.name == "recipes":
            lines.append(_line("  " * (depth + 1) + "recipes/*.yaml", _OTHERS["recipes/*.yaml"]))
    return lines


def _says(file: Path) -> str:
    """The first sentence or line of a file's docstring, whichever is shorter."""
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return first.split(". ")[0].rstrip(".")


def _line(name: str, text: str) -> str:
    return f"{name:<{_COLUMN}}{text}".rstrip()


def page() -> str:
    """The whole page."""
    return f"{_HEAD}```\n{tree()}```\n"


def main() -> None:
    """Compare or write; the exit code is 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 where something differs")
    check_only = parser.parse_args().check
    if check_only:
        sys.exit(PAGE.read_text(encoding="utf-8") != page() and f"{PAGE}: is stale; run python tools/layout_page.py")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
