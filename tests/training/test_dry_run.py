"""Ranks of large worlds, built without memory in a process of their own, and what bad worlds say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}


def test_ranks_of_a_large_world_are_built_and_plan_a_step() -> None:
    """7B parameters on 1,024 ranks: the process stays small, and planning is below one per cent of a step."""
    command = [sys.executable, "-m", "megatron_deepstack.cli", "train", "deepstack_l_7b_finetune", "--dry-run"]
    command += ["--world", "1024", "--rank", "5", "train.global_batch_size=512"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    parts = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert len(parts) == 6  # join, groups, model, first step, dealing a step, planning it
    assert all("rank     5" in line for line in parts)
    assert "GB of weights" in done.stdout
    assert "planning a step: " in done.stdout
    grown = sum(float(line.split(" MB more")[0].split()[-1]) for line in parts)
    assert grown < 1000, "the weights of a rank alone take 7 GB"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dry-run", "--world", "5000"], "expected 1 to 4096; the nearest is 4096"),
        (["--dry-run", "--world", "0"], "expected 1 to 4096; the nearest is 1"),
        (["--dry-run", "--world", "3"], "start 2 ranks"),
        (["--dry-run", "--world", "4", "--rank", "9"], "found 9 in a world of 4; the nearest is 3"),
        (["--world", "4"], "they belong to --dry-run"),
    ],
    ids=["large", "none", "no replicas", "no such rank", "no dry run"],
)
def test_worlds_that_do_not_fit(arguments: list[str], text: str) -> None:
    found = CliRunner().invoke(app, ["train", "deepstack_l_7b_finetune", *arguments], env={"COLUMNS": "200"})
    assert found.exit_code != 0
    assert text in " ".join(found.output.split())
