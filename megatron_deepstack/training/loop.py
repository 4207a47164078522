"""The loop: load a step, train it, record it, save now and then."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_deepstack.checkpoint.saver import Saved
from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.steps import Prefetcher
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.slots import chunk_slots, decoder_slots, stage_chunks
from megatron_deepstack.platform.device import max_memory_bytes
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.train_step import StepLoss, forward_backward
from megatron_deepstack.training.groups import group_table
from megatron_deepstack.training.metrics import MetricsLog, StepRecord
from megatron_deepstack.training.optimizer import StepNorm
from megatron_deepstack.training.session import Session, resume, start_session
from megatron_deepstack.training.throughput import Speed, Throughput
from megatron_deepstack.training.validation import Validation


def run(recipe: Recipe, groups: Groups, stop_after: int | None = None) -> None:
    """Train on a rank whose groups exist. Collective over all ranks. See `training.main.train`."""
    session = start_session(recipe, groups)
    resumption = resume(session)
    run_dir = Path(recipe.run_dir)
    writes = dist.get_rank() == 0
    if writes:
        _write_run_files(run_dir, recipe)
    stop = min(recipe.train.steps, stop_after or recipe.train.steps)
    with MetricsLog(
        run_dir,
        first_step=resumption.step,
        num_steps=recipe.train.steps,
        interval=recipe.train.log_interval,
        writes=writes,
    ) as log:
        for line in group_table(session.optimizer.groups):
            log.say(line)
        for fault in resumption.passed_over:
            log.say(f"not whole, passed over: {fault}")
        if resumption.path is not None:
            log.say(f"resuming after step {resumption.step} from {resumption.path}")
        try:
            _train(session, log, resumption.step, stop)
        finally:
            session.saver.close()


def _train(session: Session, log: MetricsLog, first: int, stop: int) -> None:
    recipe, clock = session.recipe, StepClock()
    validation, throughput = Validation.of(session), Throughput(recipe, session.groups)
    every = recipe.checkpoint.interval
    begin = time.perf_counter()
    for loaded in Prefetcher(session.reader, first, stop):
        clock.add("data", time.perf_counter() - begin)
        loss = forward_backward(session.engine, loaded.plan, torch.from_numpy(loaded.pixels), clock)
        with clock.part("optimizer"):
            norm = session.optimizer.step(loaded.step)
        done = loaded.step + 1
        seconds = time.perf_counter() - begin
        held_out = validation.loss() if validation is not None and validation.due(done) else None
        speed = throughput.of(loaded.plan, loaded.num_tokens, loaded.num_images, seconds)
        resumed = loaded.step == first > 0
        log.add(_record(session, loaded.step, speed, loss, norm, seconds, clock.take(), held_out, resumed=resumed))
        if done == stop or (every and done % every == 0):
            session.saver.begin(done)
        _say_saved(log, session.saver.poll())
        begin = time.perf_counter()
    _say_saved(log, session.saver.finish())


def _say_saved(log: MetricsLog, saved: Saved | None) -> None:
    if saved is not None:
        log.say(f"saved {saved.path}: training waited {saved.stall_seconds:.2f} s of {saved.seconds:.2f} s")


def _record(
    session: Session,
    step: int,
    speed: Speed,
    loss: StepLoss,
    norm: StepNorm,
    step_seconds: float,
    parts: Mapping[str, float],
    validation_loss: float | None,
    *,
    resumed: bool,
) -> StepRecord:
    lr = session.optimizer.lr
    return StepRecord(
        step=step + 1,
        loss=loss.mean,
        gradient_norm=norm.gradient_norm,
        lr=lr(Part.LANGUAGE, step),
        lr_by_part={str(part): lr(part, step) for part in session.recipe.train.trainable},
        num_targets=loss.num_tokens,
        step_seconds=step_seconds,
        **asdict(speed),
        memory_bytes=max_memory_bytes(),
        seconds=parts,
        applied=norm.applied,
        resumed=resumed,
        validation_loss=validation_loss,
    )


def _write_run_files(run_dir: Path, recipe: Recipe) -> None:
    """The resolved recipe, and the stage plan that reports draw."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    slots = decoder_slots(recipe.model)
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    stages = [{**asdict(chunk), "slots": chunk_slots(chunk, slots)} for chunk in chunks]
    (run_dir / "plan.json").write_text(json.dumps({"stages": stages}, indent=1), encoding="utf-8")
