"""The answers of a run to the questions of stores, and their scores, kept in the run folder by store.

Answers to the run's held-out questions (all of `data.validation_store`) are in RUN/answers.jsonl. Answers to any other
store, or to the first questions of a store (`--limit`), are in separate files in RUN/answers/. So answering other
questions never overwrites the score of the run.
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
from megatron_deepstack.platform.files.write_whole import partial_of, write_whole
from megatron_deepstack.platform.quantity import number_of

_PROBE_BYTES: Final = 1 << 16
"""Written to see whether there is room: a full disk still takes an empty file."""
_FIRST: Final = re.compile(r"-first-(\d+)$")


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with the model's answer."""

    id: str
    """Id of the sample in the store."""
    question: str
    answer: str
    expected: str
    """The known answer; empty if the store holds none."""
    correct: bool
    """Whether the answer equals the expected one, apart from white space around them."""
    store: str | None
    """Absolute path or URL of the store, so that a report can be written in any folder."""
    image: int | None
    """Number of the question's first image in the store; None for a question without an image."""
    step: int | None = None
    """Training steps of the checkpoint that answered; None in answers of earlier releases, as the next."""
    fingerprint: str | None = None
    """Fingerprint of the store (its plan hash): stores with the same one hold the same questions, wherever they lie."""


@dataclass(frozen=True, slots=True)
class Score:
    """Number of exact matches, and the share that guessing would reach."""

    correct: int
    """Number of questions that were answered correctly."""
    total: int
    """Number of questions whose answer is known; only these count."""
    chance: float
    """Share of the most common expected answer, 0 to 1: the best result that one fixed answer can reach."""

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Score:
        """Compute the score of a list of answers."""
        known = [answer for answer in answers if answer.expected]
        commonest = Counter(answer.expected for answer in known).most_common(1)
        chance = commonest[0][1] / len(known) if known else 0.0
        return cls(correct=sum(answer.correct for answer in known), total=len(known), chance=chance)

    @property
    def words(self) -> str:
        """The score in one line. Chance is left out for a single question, where it has no meaning."""
        if not self.total:
            return "no score: the store holds no expected answers"
        share = f"exact match {self.correct} of {self.total}"
        if self.total == 1:
            return share
        return f"{share} = {self.correct / self.total:.1%}; chance (the commonest answer every time) {self.chance:.1%}"


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """The answers in one file."""

    file: Path
    held_out: bool
    """Whether they answer all of the run's held-out questions."""
    answers: tuple[Answer, ...]

    @property
    def title(self) -> str:
        """Heading that says which questions they answer."""
        if self.held_out:
            return "Held-out questions"
        store = self.answers[0].store if self.answers else None
        name = Location.parse(store).name if store else self.file.stem
        first = _FIRST.search(self.file.stem)
        return f"First {number_of(int(first[1]), 'question')} of {name}" if first else f"Questions of {name}"

    @property
    def origin(self) -> str:
        """Which checkpoint answered, and which store asked; empty for answers of earlier releases."""
        return origin_of(self.answers[0].step, self.answers[0].fingerprint) if self.answers else ""


def origin_of(step: int | None, fingerprint: str | None) -> str:
    """Which checkpoint answered, and what was asked, in one line; empty if neither is known.

    Args:
        step: Training steps of the checkpoint.
        fingerprint: sha256 of what was asked.
    """
    parts = [] if step is None else [f"checkpoint after step {step}"]
    parts += [] if fingerprint is None else [f"questions of fingerprint {fingerprint[:12]}"]
    return ", ".join(parts)


def answers_file(run: str | Path, store: str, *, held_out: str | None, first: int | None) -> Path:
    """Return the file for the answers to a store.

    Args:
        run: The run folder.
        store: Path or URL of the store that holds the questions.
        held_out: `data.validation_store` of the run, None if it has none.
        first: Number of questions that are answered; None for all questions of the store.

    Returns:
        The path of the file in the run folder. It need not exist.
    """
    place = _place(store)
    if first is None and held_out is not None and _place(held_out) == place:
        return RunFolder(run).answers
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Location.parse(store).name)[:60].strip("-.") or "store"
    kind = "" if first is None else f"-first-{first}"
    return RunFolder(run).other_answers / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}{kind}.jsonl"


def _place(store: str) -> str:
    """Return the same name for a store, whichever way its path is written."""
    location = Location.parse(store)
    return os.path.realpath(location.local_path()) if location.is_local else str(location).rstrip("/")


def require_writable_answers(file: Path) -> None:
    """Test, before the answers are computed, that their file can be written. No file is left behind.

    Raises:
        DataError: The file cannot be written.
    """
    partial = partial_of(file)
    try:
        file.parent.mkdir(exist_ok=True)
        try:
            partial.write_text(" " * _PROBE_BYTES, encoding="utf-8")
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file}: the answers cannot be written: {error.strerror or error}; they belong into the run folder, so make "
        "room there, make it writable, or copy the run elsewhere"
    )


def write_answers(file: Path, answers: Sequence[Answer]) -> None:
    """Write a file of answers, completely or not at all. Call it on one rank only.

    Args:
        file: The file, as `answers_file` returns it.
        answers: The answers; they replace those that the file held.

    Raises:
        DataError: The file cannot be written.
    """
    lines = [
        json.dumps({item.name: getattr(answer, item.name) for item in fields(Answer)}) + "\n" for answer in answers
    ]
    try:
        file.parent.mkdir(exist_ok=True)
        write_whole(file, "".join(lines))
    except OSError as error:
        raise _not_written(file, error) from error


def read_answer_sets(run: Path) -> list[AnswerSet]:
    """Read all answers of a run, those to held-out questions first.

    Raises:
        DataError: A file is damaged.
    """
    folder = RunFolder(run)
    files = [folder.answers, *sorted(folder.other_answers.glob("*.jsonl"))]
    return [AnswerSet(file, file == folder.answers, _read(file)) for file in files if file.is_file()]


def read_answers(run: Path) -> tuple[Answer, ...]:
    """Read the answers to the run's held-out questions; there are none if the questions were not asked yet.

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
        step=record.get("step"),
        fingerprint=record.get("fingerprint"),
    )


def read_json_lines(file: Path) -> Sequence[Mapping[str, Any]]:
    """Read the records of a JSON-lines file; there are none if the file does not exist.

    A last line that is not JSON is left out, since a process that is killed may leave an incomplete line.

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
