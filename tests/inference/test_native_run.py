"""Runs of models that look at pictures at their own resolution, dense and with experts: trained, asked, evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import ANSWERS, preprocessed_run, train_two_steps
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_qwen3_vl, tiny_qwen3_vl_moe
from megatron_deepstack.testing.tiny_chat import QWEN3_VL_TOKENS, QWEN3_VL_WORDS, QWEN_CONFIG, write_chat_tokenizer

ROWS = 512


def make_native_run(folder: Path, model: ModelConfig, parallel: ParallelConfig) -> Recipe:
    tokenizer = write_chat_tokenizer(folder / "tokenizer", QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)
    model = replace(model, language=replace(model.language, vocab_size=ROWS))
    limits = {"min_pixels": 40 * 40, "max_pixels": 80 * 60}
    return preprocessed_run(folder, model, parallel, tokenizer, template=Template.QWEN3_VL, **limits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param(tiny_qwen3_vl(), ParallelConfig(pipeline=2), id="qwen3_vl-pp2"),
        pytest.param(
            tiny_qwen3_vl_moe(), ParallelConfig(tensor=2, sequence_parallel=True, expert=2), id="qwen3_vl_moe-tp2-ep2"
        ),
    ],
)
def test_it_is_trained_and_evaluated(
    ranks: Callable[[int], RankPool], tmp_path: Path, model: ModelConfig, parallel: ParallelConfig
) -> None:
    """The same answers in the layout of the training, on one rank and from an export, and pages with the pictures."""
    recipe = make_native_run(tmp_path, model, parallel)
    ranks(2).run(train_two_steps, recipe)
    asked = ["--store", str(recipe.data.store), "--max-new-tokens", "5", "--json"]
    exported = str(tmp_path / "exported")
    written = CliRunner().invoke(app, ["export", recipe.run_dir, exported])
    assert written.exit_code == 0, written.output
    alone = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.expert=1", "parallel.sequence_parallel=false"]
    answers = []
    for name, who, changes in (
        ("trained", recipe.run_dir, []),
        ("alone", recipe.run_dir, alone),
        ("exported", exported, []),
    ):
        result = CliRunner().invoke(app, ["evaluate", who, *asked, "--name", name, *changes])
        assert result.exit_code == 0, result.output
        folder = Path(json.loads(result.stdout)["folder"])
        answers.append([json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text().splitlines()])
        page = (folder / "page.html").read_text(encoding="utf-8")
        assert "data:image/" in page
        assert "no picture" not in page
    assert len(answers[0]) == len(ANSWERS)
    assert answers[0] == answers[1] == answers[2]
