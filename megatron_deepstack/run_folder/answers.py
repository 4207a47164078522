"""Answers of a run to the questions of stores, and their scores, kept in the run folder by store.

The run's held-out questions (all of `data.validation_store`) have RUN/answers.jsonl. Every other store, and a beginning
of any (`--limit`), has a file of its own in RUN/answers/, so that a look at other questions never costs the score.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import DataError
from megatron_deepstack.platform.quantity import number_of

_FIRST: Final = re.compile(r"-first-(\d+)$")


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with the model's answer."""

    id: str
    question: str
    answer: str
    expected: str
    correct: bool
    """The answer equals the expected one, surrounding white space aside."""
    store: str | None
    """Its absolute path or its URL, for a report written anywhere."""
    image: int | None
    """First image in the store; None for a question without one."""


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches, and what guessing would give."""

    correct: int
    total: int
    """Questions whose answer is known; only these count."""
    chance: float
    """Share of the commonest expected answer: the most that one fixed answer can reach."""

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Score:
        """Score of a list of answers."""
        known = [answer for answer in answers if answer.expected]
        commonest = Counter(answer.expected for answer in known).most_common(1)
        chance = commonest[0][1] / len(known) if known else 0.0
        return cls(correct=sum(answer.correct for answer in known), total=len(known), chance=chance)

    @property
    def words(self) -> str:
        """In one line. Guessing is a measure only beside several questions."""
        if not self.total:
            return "no score: the store holds no expected answers"
        share = f"exact match {self.correct} of {self.total}"
        if self.total == 1:
            return share
        return f"{share} = {self.correct / self.total:.1%}; chance (the commonest answer every time) {self.chance:.1%}"


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """Answers to one store."""

    file: Path
    held_out: bool
    """They are the run's held-out questions, all of them."""
    answers: tuple[Answer, ...]

    @property
    def title(self) -> str:
        """What they answer, for a heading."""
        if self.held_out:
            return "Held-out questions"
        store = self.answers[0].store if self.answers else None
        name = Location.parse(store).name if store else self.file.stem
        first = _FIRST.search(self.file.stem)
        return f"First {number_of(int(first[1]), 'question')} of {name}" if first else f"Questions of {name}"


def answers_file(run: str | Path, store: str, *, held_out: str | None, first: int | None) -> Path:
    """Where the answers to a store belong.

    Args:
        run: The run folder.
        store: Path or URL of the store that is asked.
        held_out: The run's own `data.validation_store`, None if it has none.
        first: Number of questions answered where that is fewer than the store has, else None.
    """
    place = _place(store)
    if first is None and held_out is not None and _place(held_out) == place:
        return RunFolder(run).answers
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Location.parse(store).name)[:60].strip("-.") or "store"
    kind = "" if first is None else f"-first-{first}"
    return RunFolder(run).other_answers / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}{kind}.jsonl"


def _place(store: str) -> str:
    """One name of a store, however it is written."""
    location = Location.parse(store)
    return os.path.realpath(location.local_path()) if location.is_local else str(location).rstrip("/")


def require_writable(file: Path) -> None:
    """Raise DataError, before the work is done, if a file of answers could not be written. Leaves nothing behind."""
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(exist_ok=True)
        partial.write_text("", encoding="utf-8")
        partial.unlink()
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file}: the answers cannot be written: {error.strerror or error}; they belong into the run folder, so make "
        "room there, make it writable, or copy the run elsewhere"
    )


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write a file of answers, whole or not at all. Call on one rank.

    Raises:
        DataError: The file cannot be written.
    """
    lines = [
        json.dumps({item.name: getattr(answer, item.name) for item in fields(Answer)}) + "\n" for answer in answers
    ]
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(exist_ok=True)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise _not_written(file, error) from error


def read_answer_sets(run: Path) -> list[AnswerSet]:
    """All answers of a run, the held-out ones first.

    Raises:
        DataError: A file is damaged.
    """
    folder = RunFolder(run)
    files = [folder.answers, *sorted(folder.other_answers.glob("*.jsonl"))]
    return [AnswerSet(file, file == folder.answers, _read(file)) for file in files if file.is_file()]


def read_answers(run: Path) -> tuple[Answer, ...]:
    """Answers to the run's held-out questions; none if they were not asked.

    Raises:
        DataError: The file is damaged.
    """
    return _read(RunFolder(run).answers)


def _read(file: Path) -> tuple[Answer, ...]:
    return tuple(_answer(record, file) for record in read_json_lines(file))


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


def read_json_lines(file: Path) -> Sequence[Mapping[str, Any]]:
    """Records of a JSON-lines file. A last line without its newline was cut off by a stop, and is left out.

    Raises:
        DataError: A line before the last is not JSON.
    """
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
