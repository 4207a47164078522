"""Whether a run is well: steps left out in a row, losses that stand out, samples that cannot be read.

What it remembers follows from the run's own records (`metrics.jsonl`), which are cut back to the checkpoint on
resumption; so a resumed run judges as one without interruption, and no checkpoint carries any of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from megatron_deepstack.config.schema import HealthConfig
from megatron_deepstack.errors import HealthError
from megatron_deepstack.platform.files.strict_json import from_line

_LEAST_RISE: Final = 0.1
"""Nats per target by which a loss must stand out: where a task is learned, batches of 0.01 and 0.03 are both usual."""

NOT_FINITE: Final = "loss or gradient not finite"
NO_TARGET: Final = "no sample has a target: all loss masks are zero"
NOT_READ: Final = "no sample could be read"
"""Why a step is left out."""
_LISTED: Final = 16
"""Steps that an error lists."""
IdsOf = Callable[[int], Sequence[str]]
"""From a 0-based step to the ids of its samples, over all replicas."""


@dataclass(slots=True)
class Health:
    """Memory of a run. The counts are alike on all ranks; the losses are kept by the rank that writes records."""

    config: HealthConfig
    skipped_in_row: int = 0
    """Steps left out one after another, the last one included."""
    unreadable: int = 0
    """Samples left out so far."""
    because: str = ""
    """Why the last step that was left out was."""
    learned: int = 0
    """Steps applied so far."""
    losses: deque[float] = field(default_factory=deque)
    """Of the last applied steps, at most `spike_window`."""

    @classmethod
    def of(cls, config: HealthConfig, records: Iterable[Mapping[str, Any]]) -> Health:
        """The state of health after the steps of earlier records.

        Args:
            config: Limits of the recipe.
            records: Records of metrics.jsonl, oldest first.

        Returns:
            The state after the last record.
        """
        health = cls(config, losses=deque(maxlen=max(config.spike_window, 1)))
        for record in records:
            loss = None if record["loss"] is None else float(record["loss"])
            because = str(record.get("skipped_because", ""))
            health.take(loss, bool(record["applied"]), int(record.get("unreadable", 0)), because)
        return health

    def take(self, loss: float | None, applied: bool, unreadable: int, because: str = "") -> bool:
        """Remember a step.

        Args:
            loss: Mean loss per target; None where no sample had a target.
            applied: Whether the optimizer took the step.
            unreadable: Samples that were left out of it.
            because: Why it was not applied.

        Returns:
            Whether its loss stands out of those before it.
        """
        self.unreadable += unreadable
        if not applied:
            self.skipped_in_row, self.because = self.skipped_in_row + 1, because or NOT_FINITE
            return False
        self.skipped_in_row, self.learned = 0, self.learned + 1
        assert loss is not None, "a step without a target was applied"
        spike = self._stands_out(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        return spike

    def _stands_out(self, loss: float) -> bool:
        config = self.config
        if not config.spike_factor or not config.spike_window or 2 * len(self.losses) < config.spike_window:
            return False
        usual = median(self.losses)
        return loss > config.spike_factor * usual and loss > usual + _LEAST_RISE

    def require_well(self, done: int, ids_of: IdsOf) -> None:
        """Check that the run may go on. The result is the same on every rank.

        Args:
            done: Steps done, those before a resumption included.
            ids_of: From a 0-based step to the ids of its samples.

        Raises:
            HealthError: Too many steps in a row were left out, or too many samples could not be read.
        """
        limit = self.config.max_skipped_steps
        if self.skipped_in_row > limit:
            steps = range(done - self.skipped_in_row, done)
            listed = "\n".join(f"  step {step + 1}: {some(ids_of(step))}" for step in steps)
            raise HealthError(
                f"{self.skipped_in_row} steps in a row were left out (the last one: {self.because}); "
                f"health.max_skipped_steps allows {limit}. Their samples:\n{listed}\n{self._advice()}; the checkpoints "
                "before them are untouched."
            )
        most = self.config.max_unreadable_samples
        if self.unreadable > most:
            raise HealthError(
                f"{self.unreadable} samples could not be read and were left out by step {done}; "
                f"health.max_unreadable_samples allows {most}. metrics.jsonl names them under `unreadable_samples`; "
                "`megatron-deepstack store verify` finds what is damaged."
            )

    def require_learned(self, done: int, ids_of: IdsOf) -> None:
        """End a run whose steps were all left out, so that it does not look like a success. The same on every rank.

        Args:
            done: Steps done, those before a resumption included.
            ids_of: From a step to its samples.

        Raises:
            HealthError: None of them was applied.
        """
        if done and not self.learned:
            listed = "\n".join(f"  step {step + 1}: {some(ids_of(step))}" for step in range(done)[:_LISTED])
            raise HealthError(
                f"nothing was learned: all {done} steps were left out (the last one: {self.because}), and no "
                f"checkpoint was saved at their end. Their samples:\n{listed}\n{self._advice()}."
            )

    def _advice(self) -> str:
        if self.because == NOT_FINITE:
            return "Look at these samples, lower the learning rate or optimizer.clip_grad, or train in fp32"
        return (
            "`megatron-deepstack store verify` finds what is damaged, `store show` what of a sample is learned; repair "
            "or leave out such records, and preprocess again"
        )


def some(ids: Sequence[str], limit: int = 16) -> str:
    """List the first samples of a step for a message. The step's record holds all of them.

    Args:
        ids: Ids of the samples.
        limit: How many are listed.

    Returns:
        The ids in one line, with the number of those that are not listed.
    """
    more = f" and {len(ids) - limit} more (see metrics.jsonl)" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def earlier_records(file: Path, num_steps: int) -> Iterator[dict[str, Any]]:
    """Read the records of the first `num_steps` steps from a run's metrics.jsonl, one at a time: there may be millions.

    Args:
        file: The file; it need not exist.
        num_steps: Number of the last step whose record is wanted, 1-based.

    Yields:
        The records in the order of the file. Lines that are not complete, for example after a kill, are left out.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _record_in(line)
            if record is not None and record["step"] <= num_steps:
                yield record


def _record_in(line: str) -> dict[str, Any] | None:
    """A step's record; None where a line is none."""
    with suppress(ValueError):
        record = from_line(line)
        return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
    return None
