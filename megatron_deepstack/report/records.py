"""The metrics of a run, read back for the report: one record per step, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.run_folder.answers import read_json_lines


@dataclass(frozen=True, slots=True)
class Metrics:
    """The loop's records in order of steps. If a step ran again after a resumption, only its last record is kept."""

    records: tuple[Mapping[str, Any], ...]
    resumed_at: tuple[int, ...]
    """First step after each resumption."""

    def series(self, name: str) -> list[tuple[float, float]]:
        """The finite values of one quantity, as pairs of step and value; `mapping/key` is one value of a mapping."""
        outer, _, key = name.partition("/")
        found: list[tuple[float, Any]] = [(record["step"], record.get(outer)) for record in self.records]
        if key:
            found = [(step, value.get(key)) for step, value in found if isinstance(value, Mapping)]
        return [(step, value) for step, value in found if _is_number(value)]

    def num_not_finite(self, name: str) -> int:
        """The number of records whose value is NaN or infinite."""
        return sum(isinstance(record.get(name), float) and not math.isfinite(record[name]) for record in self.records)


def read_metrics(run: Path) -> Metrics:
    """The metrics of a run; empty if none were written yet."""
    by_step: dict[int, Mapping[str, Any]] = {}
    resumed = []
    previous = None
    for record in read_json_lines(RunFolder(run).metrics):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if previous is not None and (step <= previous or record.get("resumed")):
            resumed.append(step)
            by_step = {earlier: kept for earlier, kept in by_step.items() if earlier < step}
        by_step[step] = record
        previous = step
    return Metrics(tuple(by_step[step] for step in sorted(by_step)), tuple(resumed))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
