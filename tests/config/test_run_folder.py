"""Names of files in a run folder: where they lie, and that nobody else writes them out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_deepstack.config import run_folder
from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder

ROOT = Path(__file__).parent.parent.parent
NAMES = ("recipe.yaml", "metrics.jsonl", "answers.jsonl", "launch.json", "events.jsonl")


def test_where_things_lie(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert folder.recipe == tmp_path / RECIPE_FILE == tmp_path / "recipe.yaml"
    assert folder.log(3) == tmp_path / "logs" / "rank_00003.log"
    for step in (2, 10):
        folder.timeline(step).touch()
    assert sorted(folder.timelines()) == [tmp_path / "timeline_step_10.json", tmp_path / "timeline_step_2.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_once(name: str) -> None:
    """As a value of its own; sentences may name it."""
    files = [file for top in ("megatron_deepstack", "orchestration") for file in (ROOT / top).rglob("*.py")]
    found = [
        str(file.relative_to(ROOT))
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == name
    ]
    assert found == [str(Path(run_folder.__file__).relative_to(ROOT))]
