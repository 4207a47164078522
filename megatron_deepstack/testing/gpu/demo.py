"""The command line from pictures to a resumed run: draw, preprocess without Ray, train, stop, resume; then in FP8."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

from megatron_deepstack.config.choices import Fp8Scaling
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.testing.gpu.engine import what_is_missing
from megatron_deepstack.testing.gpu.report import Report, Settings

_LAST_LINES = 6


def run(settings: Settings, report: Report) -> None:
    """Run the demo with a few hundred pictures and twenty steps; in a tiny trial with a handful, and four steps.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each verb.
    """
    folder, steps = demo_folder(settings), 4 if settings.tiny else 20
    pictures = 64 if settings.tiny else 640
    with report.case("draw"):
        seconds = command("draw", str(folder / "data"), f"--num-train={pictures}", "--num-heldout=8")
        report.judged("draw", True, pictures=pictures, seconds=seconds)
    with report.case("preprocess --workers 0"):
        seconds = command("preprocess", "demo", f"run_dir={folder}", "--workers=0")
        report.judged("preprocess --workers 0", True, seconds=seconds)
    train_and_resume(report, "train", folder, folder, steps, [])


def run_fp8(settings: Settings, report: Report) -> None:
    """Train the demo in FP8: under a scaling whose state a checkpoint must hold, and under one that has none.

    Args:
        settings: Size and folders of the trial, in which `run` has left its store.
        report: Gets rows for each scaling.
    """
    missing = what_is_missing()
    if missing:
        report.left_out("train in FP8", missing)
        return
    for scaling in (Fp8Scaling.DELAYED, Fp8Scaling.TENSORWISE):
        overrides = ["train.precision=fp8", f"train.fp8_scaling={scaling}", "model.layers=transformer_engine"]
        name = f"train, fp8 {scaling}"
        train_and_resume(report, name, demo_folder(settings), settings.work / f"fp8_{scaling}", 8, overrides)


def demo_folder(settings: Settings) -> Path:
    """Where the demo's data lies."""
    return settings.work / "demo"


def train_and_resume(report: Report, name: str, data: Path, folder: Path, steps: int, overrides: list[str]) -> None:
    """Train half of the steps, stop, resume, and look at the metrics.

    Args:
        report: Takes a row for each half, and one about the losses.
        name: What the rows are called.
        data: Folder of a demo whose store is whole.
        folder: The run's folder.
        steps: Steps in all.
        overrides: Further settings of the recipe.
    """
    with report.case(name):
        settings = [
            f"run_dir={folder}",
            f"data.store={data / 'train.zarr'}",
            "data.validation_store=null",
            f"data.tokenizer={data / 'data' / 'tokenizer.model'}",
            "parallel.pipeline=1",
            f"train.steps={steps}",
            "train.log_interval=1",
            *overrides,
        ]
        first = command("train", "demo", *settings, f"--stop-after={steps // 2}")
        report.judged(f"{name}, stopped after {steps // 2}", True, seconds=first)
        second = command("train", "demo", *settings)
        losses = losses_by_step(folder)
        whole = list(losses) == list(range(1, steps + 1)) and all(map(math.isfinite, losses.values()))
        note = "every step once, all losses finite"
        report.judged(f"{name}, resumed to {steps}", whole, note, seconds=second, last_loss=losses.get(steps, math.nan))


def losses_by_step(folder: Path) -> dict[int, float]:
    """What a run's metrics say."""
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: float(record["loss"]) for record in records if record.get("loss") is not None}


def command(*arguments: str) -> float:
    """Run `megatron-deepstack ARGUMENTS` and return its seconds.

    Args:
        arguments: A verb and what it takes.

    Returns:
        Seconds from start to end.

    Raises:
        RuntimeError: It failed; with its exit code and what it printed last.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_deepstack.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        last = "\n".join(done.stdout.rstrip().splitlines()[-_LAST_LINES:])
        raise RuntimeError(f"megatron-deepstack {arguments[0]} left with exit code {done.returncode}:\n{last}")
    return time.perf_counter() - begin
