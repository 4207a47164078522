"""The loop: load a step, train it, record it, save now and then; end in order on request, or when the run goes wrong.

Whatever a rank alone may see (a signal, a gradient that is not finite, a sample that cannot be read) is first agreed on
by all ranks, so that all ranks do the same and none waits for one that has left.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_deepstack.checkpoint.saving.saver import Saved
from megatron_deepstack.config.choices import Part, Unreadable
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.order.prefetch import Prefetcher
from megatron_deepstack.data.order.steps import LoadedStep
from megatron_deepstack.errors import DeepStackError, HealthError, PreemptedError, of_all_ranks
from megatron_deepstack.parallel.agree import phase, sum_over_ranks
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.reduce import of_every_rank
from megatron_deepstack.planning.budget.cost import stage_weights
from megatron_deepstack.planning.slots import chunk_slots, decoder_slots, stage_chunks
from megatron_deepstack.platform.compute.device import max_memory_bytes
from megatron_deepstack.platform.files.run_disk import writing
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.run_folder.recipe import record_start_folder
from megatron_deepstack.run_folder.starting_weights import StartingWeights, write_starting_weights
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.train_step import StepLoss, gradient_sums
from megatron_deepstack.step.work import WorkTimers
from megatron_deepstack.training.ahead import ReadyStep, ReadySteps
from megatron_deepstack.training.evaluation import Examination
from megatron_deepstack.training.guard.health import NO_TARGET, NOT_FINITE, NOT_READ, Health, earlier_records, some
from megatron_deepstack.training.guard.preemption import StopRequest, never
from megatron_deepstack.training.guard.stragglers import Stragglers
from megatron_deepstack.training.guard.unreadable import leave_out_unreadable
from megatron_deepstack.training.guard.watchdog import PATIENT, Watchdog
from megatron_deepstack.training.metrics.console import say
from megatron_deepstack.training.metrics.forecast import Forecast
from megatron_deepstack.training.metrics.observe import Observer
from megatron_deepstack.training.metrics.record import StepRecord
from megatron_deepstack.training.metrics.throughput import Throughput
from megatron_deepstack.training.metrics.writers import MetricsLog
from megatron_deepstack.training.optim.groups import group_table
from megatron_deepstack.training.optim.optimizer import StepNorm
from megatron_deepstack.training.session import Resumption, Session, begin, resume, start_session
from megatron_deepstack.training.validation import Validation


def run(recipe: Recipe, groups: Groups, stop_after: int | None = None, asked: Callable[[], bool] = never) -> None:
    """Train on a rank whose groups exist. Collective over all ranks.

    Args:
        recipe: The run's recipe.
        groups: The process groups.
        stop_after: Save and end after that many steps in all; None: at the recipe's end.
        asked: Called in each step; whether the launcher wants this rank to save and stop.

    Raises:
        DeepStackError: See `training.main.train`.
    """
    run_dir, rank = Path(recipe.run_dir), dist.get_rank()
    stop = min(recipe.train.steps, stop_after or recipe.train.steps)
    with phase(), writing(run_dir):
        guard = Watchdog(run_dir, rank, dist.get_world_size(), recipe.health.hang_seconds)
    with StopRequest(asked) as request, guard as watchdog:
        beginning = begin(recipe, groups)
        if beginning.step >= stop:
            if rank == 0:
                say(_nothing_to_do(recipe, beginning.step, stop_after))
            return
        session = start_session(recipe, groups, beginning)
        with closing(session.saver):
            resumption = resume(session)
            with phase():
                if rank == 0:
                    _write_run_files(run_dir, recipe, session.starting)
                records = MetricsLog(recipe, first_step=resumption.step, writes=rank == 0)
            with records as log:
                _greet(log, session, resumption)
                _Loop(session, log, request, watchdog, resumption.step, stop).run()


def _nothing_to_do(recipe: Recipe, done: int, stop_after: int | None) -> str:
    """The line of a run that has already done all steps that were asked for."""
    steps = recipe.train.steps
    if done >= steps:
        return f"nothing to do: {done} of {steps} steps are done; raise train.steps to go on"
    return f"nothing to do: {done} of {steps} steps are done, and --stop-after asks for {stop_after}; raise it to go on"


def _greet(log: MetricsLog, session: Session, resumption: Resumption) -> None:
    for line in group_table(session.optimizer.groups):
        log.say(line)
    for line in () if session.starting is None else session.starting.lines():
        log.say(line)
    for fault in resumption.passed_over:
        log.say(f"not whole, passed over: {fault}")
    if resumption.path is not None:
        begins = resumption.step == 0  # a checkpoint of weights alone
        log.say(f"{'beginning' if begins else f'resuming after step {resumption.step}'} from {resumption.path}")


@dataclass(slots=True)
class _Agreement:
    """What all ranks settle before a step's gradients are applied, in one reduction."""

    loss: float | None
    """Mean over all targets; None where there is none."""
    asked: bool
    """This rank was asked to stop."""
    stop: bool = False
    """Any rank was."""

    def __call__(self, gradient_norm: float) -> bool:
        """Whether there is a loss, and it and the gradient are finite on every rank. Collective over all ranks."""
        sound = self.loss is not None and math.isfinite(self.loss) and math.isfinite(gradient_norm)
        num_unsound, num_asked = sum_over_ranks([not sound, self.asked])
        self.stop = num_asked > 0
        return num_unsound == 0


class _Loop:
    """Steps `first` to `stop - 1` on this rank."""

    def __init__(
        self, session: Session, log: MetricsLog, request: StopRequest, watchdog: Watchdog, first: int, stop: int
    ) -> None:
        """Collective over all ranks."""
        recipe = session.recipe
        self.session, self.log, self.request, self.watchdog = session, log, request, watchdog
        self.first, self.stop = first, stop
        self.leaving = False
        """Whether any rank has been asked to stop, as far as all ranks know."""
        self.clock = StepClock()
        session.engine.model.config.timers = WorkTimers(self.clock.work)
        self.validation, exam = Validation.of(session), session.beginning.exam
        self.examination = None if exam is None else Examination(recipe, session.engine, exam)
        self.throughput, self.observer = Throughput(recipe, session.groups), Observer(recipe, session.groups)
        self.stragglers = Stragglers(recipe.health, of_every_rank(socket.gethostname()), _weights_of_ranks(session))
        self.health = _health_after(recipe, first)
        self.forecast = Forecast.of(session, first) if dist.get_rank() == 0 else None

    def run(self) -> None:
        """Collective over all ranks. Raises PreemptedError once it was asked to stop and has saved."""
        begin = time.perf_counter()
        for ready in self._ready():
            done = ready.loaded.step + 1
            self._step(ready, begin)
            self._require_well(done)
            if self.leaving or (self._save_due(done) and self.health.learned):
                self._begin_save(done)
            self._say_saved(self.session.saver.poll())
            if self.leaving and done < self.stop:
                self._leave(done)
            self.watchdog.progress(f"waiting for the data of step {done + 1}")
            begin = time.perf_counter()
        self._finish_save()

    def _ready(self) -> Iterator[ReadyStep]:
        """This rank's steps, prepared ahead; only this rank knows what it cannot read."""
        try:
            steps = ReadySteps(self.session.reader, self.session.engine)
            yield from Prefetcher(steps, self.first, self.stop)
        except DeepStackError as error:
            error.rank, error.host = dist.get_rank(), socket.gethostname()
            raise

    def _step(self, ready: ReadyStep, begin: float) -> None:
        """Train and record one step, with what is measured after it unless a rank was asked to stop."""
        loaded = ready.loaded
        done = loaded.step + 1
        self.watchdog.progress(f"step {done}", PATIENT if loaded.step == self.first else 1.0)
        with self.observer.step(done, self.clock):
            self.clock.add("data", time.perf_counter() - begin)
            loaded, unreadable = self._readable(loaded)
            staged = ready.with_plan_of(loaded, self.session.engine).staged
            loss = gradient_sums(self.session.engine, loaded.plan, staged, self.clock)
            agreement = _Agreement(_mean(loss), self.request.asked)
            with self.clock.part("optimizer"):
                norm = self.session.optimizer.step(loaded.step, agreement, loss.gradient_scale)
            seconds = time.perf_counter() - begin
        self.leaving = agreement.stop
        held_out, scores = self._validated(done), self._examined(done)
        record = self._record(loaded, loss, norm, seconds, held_out, scores, unreadable)
        self.log.add(record)
        if self.forecast is not None and (line := self.forecast.take(record)):
            self.log.say(line)

    def _left(self) -> bool:
        """Whether any rank has been asked to stop by now. Collective over all ranks."""
        self.leaving = self.leaving or sum_over_ranks([self.request.asked])[0] > 0
        return self.leaving

    def _validated(self, done: int) -> float | None:
        """Loss on held-out samples, if it is due after this step. Collective over all ranks."""
        if self.leaving or self.validation is None or not self.validation.due(done):
            return None
        self.session.engine.gather_parameters()
        loss = self.validation.loss(self.watchdog.progress, self._left)
        if self.leaving:
            self.log.say(f"validation after step {done} left out: asked to stop")
        return loss

    def _examined(self, done: int) -> dict[str, float]:
        """Means of all scores, if questions are asked after this step. Collective over all ranks."""
        if self.leaving or self.examination is None or not self.examination.due(done):
            return {}
        begin = time.perf_counter()
        evaluation = self.examination.evaluate(done, self.watchdog.progress, lambda: self.request.asked)
        if evaluation is None:
            self.leaving = True
            self.log.say(f"evaluation after step {done} left out: asked to stop")
            return {}
        self.log.say(f"{self.examination.told(evaluation)}, {time.perf_counter() - begin:.1f} s")
        return evaluation.means()

    def _readable(self, loaded: LoadedStep) -> tuple[LoadedStep, tuple[str, ...]]:
        """The step without samples that cannot be read, and their ids. Collective over all ranks."""
        if self.session.recipe.data.unreadable is Unreadable.STOP:
            return loaded, ()
        loaded, ids, reasons = leave_out_unreadable(loaded, self.session.reader)
        if ids:
            self.log.say(f"step {loaded.step + 1}: left out, since they cannot be read: {some(ids)}\n{reasons}")
        return loaded, ids

    def _record(
        self,
        loaded: LoadedStep,
        loss: StepLoss,
        norm: StepNorm,
        step_seconds: float,
        validation_loss: float | None,
        scores: dict[str, float],
        unreadable: tuple[str, ...],
    ) -> StepRecord:
        """The step's record, and a console line for whatever stands out. Collective over all ranks."""
        step, lr = loaded.step, self.session.optimizer.lr
        parts = self.clock.take()
        slow, slow_line = self.stragglers.take(parts["data"] + self.clock.work.take())
        mean, because = _mean(loss), "" if norm.applied else self._why_left_out(loss, len(unreadable))
        spike = self.health.take(mean, norm.applied, len(unreadable), because)
        samples = self.session.reader.sample_ids(step) if spike or not norm.applied else ()
        if slow:
            self.log.say(slow_line)
        if samples:
            what = "loss stands out" if norm.applied else f"left out, {because}"
            told = "" if mean is None else f" (loss {mean:.4f})"
            self.log.say(f"step {step + 1}: {what}{told}; samples {some(samples)}")
        speed = self.throughput.of(loaded.plan, loaded.num_tokens, loaded.num_images, step_seconds)
        return StepRecord(
            step=step + 1,
            loss=mean,
            gradient_norm=norm.gradient_norm,
            lr=lr(Part.LANGUAGE, step),
            lr_by_part={str(part): lr(part, step) for part in self.session.recipe.train.trainable},
            num_targets=loss.num_tokens,
            step_seconds=step_seconds,
            **asdict(speed),
            **asdict(loaded.balance),
            **(asdict(loss.experts) if loss.experts else {}),
            memory_bytes=max_memory_bytes(),
            seconds=parts,
            applied=norm.applied,
            skipped_because=because,
            resumed=step == self.first > 0,
            validation_loss=validation_loss,
            evaluation=scores,
            skipped_steps=self.health.skipped_in_row,
            spike=spike,
            samples=samples,
            unreadable=len(unreadable),
            unreadable_samples=unreadable,
            slow_ranks=slow,
            stall_seconds=self.session.saver.take_stall_seconds(),
        )

    def _why_left_out(self, loss: StepLoss, num_unreadable: int) -> str:
        """In words; the same on every rank."""
        if loss.num_tokens:
            return NOT_FINITE
        if num_unreadable == self.session.recipe.train.global_batch_size:
            return NOT_READ
        return NO_TARGET + (f" ({num_unreadable} samples could not be read)" if num_unreadable else "")

    def _require_well(self, done: int) -> None:
        """Raise HealthError, on every rank alike, where the run must not go on or has ended without learning."""
        ids_of = self.session.reader.sample_ids
        try:
            self.health.require_well(done, ids_of)
            if done == self.stop:
                self.health.require_learned(done, ids_of)
        except HealthError as error:
            self._finish_save()  # every rank is here, and a save in flight is of a step before the trouble
            raise of_all_ranks(error) from None

    def _save_due(self, done: int) -> bool:
        every = self.session.recipe.checkpoint.interval
        return done == self.stop or bool(every and done % every == 0)

    def _begin_save(self, done: int) -> None:
        self.watchdog.progress(f"saving after step {done}", PATIENT)
        self.session.engine.gather_parameters()
        self.session.saver.begin(done)

    def _finish_save(self) -> None:
        self.watchdog.progress("finishing a checkpoint", PATIENT)
        self._say_saved(self.session.saver.finish())

    def _leave(self, done: int) -> None:
        self._finish_save()
        raise of_all_ranks(
            PreemptedError(
                f"asked to stop: saved after step {done} of {self.session.recipe.train.steps}; run the same command "
                "again to go on from there"
            )
        )

    def _say_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            waited = f"training waited {saved.stall_seconds:.2f} s of {saved.seconds:.2f} s"
            self.log.say(f"saved {saved.path}: {waited}")
            for fault in saved.faults:
                self.log.say(fault)


def _mean(loss: StepLoss) -> float | None:
    """Mean loss per target; None where no sample of any rank has a target: a mean of nothing is not 0."""
    return loss.mean if loss.num_tokens else None


def _weights_of_ranks(session: Session) -> list[int]:
    """The size of every rank's stage."""
    by_stage = stage_weights(session.recipe.model.language, session.recipe.parallel)
    return [by_stage[session.groups.axes.place(rank).pp] for rank in range(dist.get_world_size())]


def _health_after(recipe: Recipe, first: int) -> Health:
    """Health of a run after `first` steps: rank 0 reads the records, all learn the counts. Collective."""
    file = RunFolder(recipe.run_dir).metrics
    health = Health.of(recipe.health, earlier_records(file, first) if dist.get_rank() == 0 else ())
    skipped, unreadable, learned = sum_over_ranks([health.skipped_in_row, health.unreadable, health.learned])
    health.skipped_in_row, health.unreadable = int(skipped), int(unreadable)
    known = sum_over_ranks([file.is_file() and dist.get_rank() == 0])[0] > 0
    health.learned = int(learned) if known else first  # without records nothing says that a checkpoint learned nothing
    return health


def _write_run_files(run_dir: Path, recipe: Recipe, starting: StartingWeights | None) -> None:
    """The resolved recipe, the stage plan that reports draw, and where the weights of a new run came from."""
    slots = decoder_slots(recipe.model)
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    stages = [{**asdict(chunk), "slots": chunk_slots(chunk, slots)} for chunk in chunks]
    with writing(run_dir):
        record_start_folder(run_dir)
        write_whole(RunFolder(run_dir).recipe, recipe_to_yaml(recipe))
        write_whole(RunFolder(run_dir).plan, json.dumps({"stages": stages}, indent=1, allow_nan=False))
        if starting is not None:
            write_starting_weights(run_dir, starting)
