"""What a run folder holds, read back for the report: metrics by step, answers, the resolved recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import DataError


@dataclass(frozen=True, slots=True)
class Metrics:
    """The loop's records in order of steps. Steps that were run again after a resumption count once, the last time."""

    records: tuple[Mapping[str, Any], ...]
    resumed_at: tuple[int, ...]
    """First step after each resumption."""

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the value was recorded and is finite."""
        return [(record["step"], record[name]) for record in self.records if _is_number(record.get(name))]

    def num_not_finite(self, name: str) -> int:
        """Records whose value is NaN or infinite."""
        return sum(isinstance(record.get(name), float) and not math.isfinite(record[name]) for record in self.records)


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out question."""

    id: str
    question: str
    answer: str
    expected: str
    correct: bool
    store: str | None
    image: int | None
    """Image in the store; None for a question without one."""


def read_metrics(run: Path) -> Metrics:
    """Metrics of a run; empty if none were written yet."""
    by_step: dict[int, Mapping[str, Any]] = {}
    resumed = []
    previous = None
    for record in _read_lines(RunFolder(run).metrics):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if previous is not None and (step <= previous or record.get("resumed")):
            resumed.append(step)
            by_step = {earlier: kept for earlier, kept in by_step.items() if earlier < step}
        by_step[step] = record
        previous = step
    return Metrics(tuple(by_step[step] for step in sorted(by_step)), tuple(resumed))


def read_answers(run: Path) -> tuple[Answer, ...]:
    """Answers of a run's last `generate`; none if it was not run."""
    file = RunFolder(run).answers
    return tuple(_answer(record, file) for record in _read_lines(file))


def _answer(record: Mapping[str, Any], file: Path) -> Answer:
    missing = [key for key in ("id", "question", "answer", "expected", "correct") if key not in record]
    if missing:
        raise DataError(f"{file}: a record has no {', '.join(missing)}; run `generate` again")
    image = record.get("image")
    return Answer(
        id=str(record["id"]),
        question=str(record["question"]),
        answer=str(record["answer"]),
        expected=str(record["expected"]),
        correct=bool(record["correct"]),
        store=record.get("store"),
        image=image if isinstance(image, int) else None,
    )


def _read_lines(file: Path) -> Sequence[Mapping[str, Any]]:
    """Records of a JSON-lines file. A last line without its newline was cut off by a stop, and is left out."""
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                continue
            raise DataError(f"{file}, line {number}: is not JSON ({error}); remove the line to go on") from error
        if isinstance(record, dict):
            records.append(record)
    return records


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
