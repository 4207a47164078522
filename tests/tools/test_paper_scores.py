"""The paper's row beside ours, from results in lmms-eval's form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.errors import DataError


@pytest.fixture(scope="module")
def tool() -> Any:
    path = Path(__file__).resolve().parents[2] / "tools" / "paper_scores.py"
    spec = importlib.util.spec_from_file_location("paper_scores", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_have_a_value_for_each_benchmark(tool: Any) -> None:
    """The paper's means of nine, which it gives as gains of 2.7, 2.9 and 3.8 points over LLaVA-1.5."""
    assert {len(row) for row in tool.PAPER.values()} == {len(tool.BENCHMARKS)} == {9}
    mean = {name: sum(row) / 9 for name, row in tool.PAPER.items()}
    assert mean["DeepStack-L-7B"] - mean["LLaVA-1.5-7B"] == pytest.approx(2.7, abs=0.1)
    assert mean["DeepStack-L-13B"] - mean["LLaVA-1.5-13B"] == pytest.approx(2.9, abs=0.1)
    assert mean["DeepStack-V-7B"] - mean["LLaVA-1.5-7B"] == pytest.approx(3.8, abs=0.1)


def test_shares_become_percent_and_what_is_missing_stays_open(tool: Any) -> None:
    results = {
        "results": {
            "vqav2_val": {"exact_match,none": 0.801, "exact_match_stderr,none": 0.1, "alias": "vqav2_val"},
            "mmvet": {"gpt_eval_score,none": 30.5},
            "gqa": {"other,none": 0.5},
        }
    }
    ours = tool.our_row(results)
    assert ours[0] == pytest.approx(80.1)
    assert (ours[1], ours[8]) == (None, 30.5)
    lines = tool.table("DeepStack-L-7B", ours).splitlines()
    assert lines[3].split()[:3] == ["difference", "+0.6", "-"]


def test_the_command_names_all_tasks(tool: Any) -> None:
    words = tool.command(Path("run"), Path("out"), ["--limit", "8"])
    assert "vqav2_val,gqa,textvqa_val,docvqa_val,infovqa_val,seedbench,pope,mmmu_val,mmvet" in words
    assert words[-2:] == ["--limit", "8"]


def test_without_results_the_folder_is_named(tool: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results of lmms-eval"):
        tool.newest_results(tmp_path)
