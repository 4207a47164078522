"""An evaluation: answers to the questions of a store or a file, with their scores, as kept in a run's folder.

RUN/evaluations/NAME/answers         one line of JSON per question
RUN/evaluations/NAME/scores.json     the means, and what was evaluated
RUN/evaluations/NAME/page.html       written by `evaluate`, for people
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.run_folder import ANSWERS_FILE, RunFolder
from megatron_deepstack.errors import DataError
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.scores.metrics import METRICS, scores_of

SCORES: Final = "scores.json"
PAGE: Final = "page.html"
_PROBE_BYTES: Final = 1 << 16
"""Written to see whether there is room: a full disk still takes an empty file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One question with its answer and its scores."""

    id: str
    question: str
    answer: str
    references: tuple[str, ...]
    scores: Mapping[str, float]
    """Metric to score, 0 to 1; empty without references."""
    category: str = ""
    pictures: tuple[str, ...] = ()
    """Paths or URLs of its pictures, of a file of questions."""
    store: str | None = None
    """The store that holds its image, of a store of questions."""
    image: int | None = None
    """Number of its first image in that store."""
    error: str | None = None
    """Why it could not be asked; its answer is empty then, and counts as wrong."""

    @classmethod
    def of(cls, answer: str, references: Sequence[str], **facts: Any) -> Scored:
        """Score an answer.

        Args:
            answer: What the model said.
            references: Known answers.
            **facts: The other fields.

        Returns:
            The scored answer.
        """
        return cls(answer=answer, references=tuple(references), scores=scores_of(answer, references), **facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """All questions of one evaluation."""

    name: str
    """Name of its folder."""
    source: str
    """Store or file of the questions."""
    step: int | None
    """Training steps of the checkpoint; None for a folder of weights, which does not say them."""
    fingerprint: str | None = None
    """sha256 of what was asked; None in evaluations of earlier releases."""
    answers: tuple[Scored, ...] = field(default=())

    def means(self, category: str | None = None) -> dict[str, float]:
        """Mean of each metric over the questions for which it is defined.

        Args:
            category: Only questions of this category; None for all.

        Returns:
            Metric to mean, in the order of `METRICS`.
        """
        chosen = [one.scores for one in self.answers if category is None or one.category == category]
        found = {name: [scores[name] for scores in chosen if name in scores] for name in METRICS}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    @property
    def categories(self) -> list[str]:
        """The categories of its questions, sorted; empty if they have none."""
        return sorted({one.category for one in self.answers if one.category})

    def document(self) -> dict[str, Any]:
        """The means as one JSON document."""
        return {
            "name": self.name,
            "source": self.source,
            "step": self.step,
            "fingerprint": self.fingerprint,
            "questions": len(self.answers),
            "with_references": sum(bool(one.references) for one in self.answers),
            "not_asked": sum(one.error is not None for one in self.answers),
            "scores": self.means(),
            "categories": {category: self.means(category) for category in self.categories},
        }


def evaluation_name(source: str, first: int | None = None, step: int | None = None) -> str:
    """The name of an evaluation's folder.

    Args:
        source: Path or URL of the questions.
        first: Number of questions, if only the first are asked.
        step: Training step, where evaluations of several steps are kept.

    Returns:
        A name of letters, digits, dots, dashes and underscores.
    """
    last = source.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"\.(zarr|jsonl?)$", "", last))[:60].strip("-.") or "questions"
    return name + ("" if first is None else f"-first-{first}") + ("" if step is None else f"-step-{step:08d}")


def folder_of(run: str | Path, name: str) -> Path:
    """The folder of an evaluation; it need not exist.

    Args:
        run: The run folder.
        name: The evaluation's name, see `evaluation_name`.

    Returns:
        The folder.
    """
    return RunFolder(run).evaluations / name


def require_writable(run: str | Path, name: str) -> None:
    """Test, before questions are asked, that an evaluation can be written. Nothing is left behind.

    Args:
        run: The run folder.
        name: The evaluation's name.

    Raises:
        DataError: It cannot be written.
    """
    folder = folder_of(run, name)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", " " * _PROBE_BYTES)
        (folder / ".writable").unlink()
        if is_new:
            folder.rmdir()
    except OSError as error:
        raise _not_written(folder, error) from error


def replaced_source(run: str | Path, name: str, fingerprint: str) -> str | None:
    """Whose answers an evaluation will replace, if they are to other questions.

    Args:
        run: The run folder.
        name: The evaluation's name; stores and files of the same name share it by default.
        fingerprint: What is about to be asked.

    Returns:
        Store or file of the earlier evaluation; None if there is none, or it asked the same.
    """
    try:
        facts = json.loads((folder_of(run, name) / SCORES).read_text(encoding="utf-8"))
        return None if facts.get("fingerprint") in (None, fingerprint) else str(facts["source"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _not_written(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: the evaluation cannot be written: {error.strerror or error}; make room in the run folder, or make "
        "it writable"
    )


def write_evaluation(run: str | Path, evaluation: Evaluation) -> Path:
    """Write the answers and the means. Call it on one rank only.

    Args:
        run: The run folder.
        evaluation: Replaces an earlier one of the same name.

    Returns:
        The evaluation's folder.

    Raises:
        DataError: The files cannot be written.
    """
    folder = folder_of(run, evaluation.name)
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in evaluation.answers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ANSWERS_FILE, lines)
        write_whole(folder / SCORES, json.dumps(evaluation.document(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _not_written(folder, error) from error
    return folder


def read_evaluations(run: str | Path) -> list[Evaluation]:
    """Read all evaluations of a run, by name.

    Raises:
        DataError: A file is damaged; the message names it.
    """
    folders = sorted(file.parent for file in RunFolder(run).evaluations.glob(f"*/{SCORES}"))
    return [_read(folder) for folder in folders]


def _lines_of(file: Path) -> list[str]:
    """Its lines. `splitlines` would also divide texts at characters such as U+2028, which JSON need not escape."""
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line]


def _read(folder: Path) -> Evaluation:
    try:
        facts = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        records = [json.loads(line) for line in _lines_of(folder / ANSWERS_FILE)]
        answers = tuple(
            Scored(
                **{
                    **record,
                    "references": tuple(record["references"]),
                    "pictures": tuple(record["pictures"]),
                }
            )
            for record in records
        )
        return Evaluation(
            name=folder.name,
            source=facts["source"],
            step=None if facts["step"] is None else int(facts["step"]),
            fingerprint=facts.get("fingerprint"),
            answers=answers,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot be read as an evaluation ({type(error).__name__}: {error}); run `evaluate` again, or "
            "remove the folder"
        ) from error
