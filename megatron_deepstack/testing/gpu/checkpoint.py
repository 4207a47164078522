"""What an asynchronous checkpoint costs training: the stall of the first save and of later ones, steps beside it."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

from megatron_deepstack.checkpoint.saving.saver import Saved, Saver
from megatron_deepstack.config.choices import Layers
from megatron_deepstack.config.schema import CheckpointConfig, Recipe
from megatron_deepstack.platform.compute.device import synchronize
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.stage import Stage, stage_size
from megatron_deepstack.testing.gpu.timing import only_rank

_SAVES = 3


def run(settings: Settings, report: Report) -> None:
    """Train and save two layers of the stage and a quarter of its vocabulary: 7 GB of weights and optimizer states.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each save.
    """
    groups, size = only_rank(settings), stage_size(tiny=settings.tiny)
    language = replace(size.language, num_layers=4 if settings.tiny else 2)
    if not settings.tiny:
        language = replace(language, vocab_size=8192)
    small = replace(size, language=language, micro_batches=2)
    stage = Stage(groups, small, Layers.LOCAL)
    recipe = Recipe(
        model=stage.model,
        parallel=stage.parallel,
        run_dir=str(settings.work / "saves"),
        checkpoint=CheckpointConfig(keep=1),
    )
    Path(recipe.run_dir).mkdir()
    saver = Saver(recipe, stage.engine.model, stage.optimizer.chained, {}, groups.axes)
    try:
        _save_often(report, stage, saver)
    finally:
        saver.close()


def _save_often(report: Report, stage: Stage, saver: Saver) -> None:
    step = _Step(stage)
    step.seconds()
    plain = statistics.median(step.seconds() for _ in range(3))
    for number in range(1, _SAVES + 1):
        saver.begin(stage.steps_done)
        beside: list[float] = []
        saved: Saved | None = None
        while saved is None:
            beside.append(step.seconds())
            saved = saver.poll()
        report.measured(
            f"save {number}",
            "first: memory is made and page-locked" if number == 1 else "",
            GB=saved.num_bytes / 1e9,
            stall_ms=1000 * saved.stall_seconds,
            whole_after_s=saved.seconds,
            step_ms=1000 * plain,
            step_beside_ms=1000 * statistics.median(beside),
        )


class _Step:
    """A training step of the stage, over and over."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.plan = stage, stage.plan(stage.size.seq_lengths[-1])

    def seconds(self) -> float:
        """Forward, backward and update, waited for."""
        stored = self.stage.rows(self.plan)
        synchronize()
        begin = time.perf_counter()
        self.stage.forward_backward(self.plan, stored)
        self.stage.update()
        synchronize()
        return time.perf_counter() - begin
