"""Where the questions of an evaluation come from: a store that `preprocess` has made, or a file with its pictures."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.ask.preparation import Asked, LoadedPictures, Preparation
from megatron_deepstack.inference.question_file import AskedQuestion, read_questions
from megatron_deepstack.inference.questions import Question, Views, read_question
from megatron_deepstack.scores.evaluation import Scored, evaluation_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Which questions are asked: those of a file, or else those of a store."""

    store: str | None = None
    """Folder or URL of a store; None takes `data.validation_store`."""
    file: Path | None = None
    images: str | None = None
    """Folder or URL to which the file's pictures are relative."""
    limit: int | None = None
    """Only the first so many."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A question that is about to be answered."""

    number: int
    """Its number in the exam."""
    question: Question | None
    """None if it cannot be asked."""
    room: int | None = None
    """Most tokens of its answer, up to the end of the context; None for no limit."""
    error: str | None = None


class Exam(ABC):
    """The questions. It pickles, since every rank has it."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of questions."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 of what is asked, wherever it lies: two evaluations with the same one are of the same questions."""

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> tuple[list[Taken], Views]:
        """Read some questions.

        Args:
            numbers: Their numbers.

        Returns:
            The questions in that order, and the source of their images.
        """

    @abstractmethod
    def scored(self, taken: Taken, answer: str) -> Scored:
        """Score an answer.

        Args:
            taken: The question, as `take` returned it.
            answer: The model's answer; empty if the question could not be asked.

        Returns:
            The question with its answer and its scores.
        """


@dataclass(frozen=True, slots=True)
class StoreExam(Exam):
    """The first question of each sample of a store; the expected answer is its only reference."""

    store: Store
    tokenizer: Tokenizer
    path: str
    first: int | None = None
    """Only so many questions; None for all."""

    def __len__(self) -> int:
        return len(self.store) if self.first is None else min(self.first, len(self.store))

    @property
    def fingerprint(self) -> str:
        """As the base says: the store's."""
        return self.store.plan_hash

    def take(self, numbers: Sequence[int]) -> tuple[list[Taken], Views]:
        """As the base says."""
        return [Taken(number, read_question(self.store, number, self.tokenizer)) for number in numbers], self.store

    def scored(self, taken: Taken, answer: str) -> Scored:
        """As the base says.

        Args:
            taken: The question; one of a store can always be asked.
            answer: The model's answer.

        Returns:
            The question with its answer and its scores.
        """
        question = taken.question
        assert question is not None
        return Scored.of(
            answer,
            (question.expected,) if question.expected else (),
            id=question.id,
            question=question.text,
            store=str(Location.parse(self.path).absolute()),
            image=question.images[0] if question.images else None,
        )


@dataclass(frozen=True, slots=True)
class FileExam(Exam):
    """The questions of a file, whose pictures are processed when they are asked."""

    preparation: Preparation
    questions: tuple[AskedQuestion, ...]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def fingerprint(self) -> str:
        """As the base says: of texts, known answers and names of pictures, but not of what the pictures show."""
        told = [
            (one.id, one.text, one.answers, one.category, [Location.parse(picture).name for picture in one.pictures])
            for one in self.questions
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def take(self, numbers: Sequence[int]) -> tuple[list[Taken], Views]:
        """As the base says. A question whose picture cannot be used is taken with the reason."""
        taken: list[Taken] = []
        views = LoadedPictures(self.preparation.processor, ())
        for number in numbers:
            asked = self.questions[number]
            try:
                prepared = self.preparation.prepare(Asked(asked.text, asked.pictures))
            except DataError as error:
                taken.append(Taken(number, None, error=str(error)))
                continue
            question = self.preparation.question(prepared, number, len(views.pictures))
            views = replace(views, pictures=(*views.pictures, *prepared.pictures))
            taken.append(Taken(number, question, prepared.room))
        return taken, views

    def scored(self, taken: Taken, answer: str) -> Scored:
        """As the base says.

        Args:
            taken: The question, or why it could not be asked.
            answer: The model's answer.

        Returns:
            The question with its answer and its scores, or with the reason.
        """
        asked = self.questions[taken.number]
        return Scored.of(
            answer,
            asked.answers,
            id=asked.id,
            question=asked.text,
            category=asked.category,
            pictures=asked.pictures,
            error=taken.error,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedExam:
    """Questions, and what is needed to ask them."""

    exam: Exam
    tokenizer: Tokenizer
    """The model's."""
    template: str
    """By which the questions are written."""
    source: str
    """Store or file of the questions."""
    first: int | None
    """Number of questions, if only the first are asked."""

    @property
    def name(self) -> str:
        """Name of its evaluations."""
        return evaluation_name(self.source, self.first)

    def name_at(self, step: int) -> str:
        """Name of the evaluation after so many training steps, where those of several steps are kept."""
        return evaluation_name(self.source, self.first, step)


def open_exam(answerer: Answerer, questions: Questions, verb: str, say: Callable[[str], None]) -> OpenedExam:
    """Open the questions of a store or of a file.

    Args:
        answerer: Who is going to be asked.
        questions: What is asked.
        verb: What the user called, for messages.
        say: Called with a line where something is unusual.

    Returns:
        The questions.

    Raises:
        ConfigError: No questions or no tokenizer are named.
        DataError: The file or the tokenizer cannot be used.
        StoreError: The store cannot be used, or does not fit the model.
    """
    preparation = answerer.preparation(verb, say)
    exam: Exam
    if questions.file is not None:
        asked = read_questions(questions.file, questions.images)[: questions.limit]
        exam, template, source = FileExam(preparation, tuple(asked)), str(preparation.template), str(questions.file)
    else:
        path = questions.store if questions.store is not None else answerer.recipe.data.validation_store
        if path is None:
            raise ConfigError(["data.validation_store: not set; name questions with --store or --file"])
        store, source = answerer.open_store(path), path
        template = store.attributes.tokenizer["template"]
        exam = StoreExam(store, preparation.tokenizer, path, questions.limit)
    return OpenedExam(
        exam=exam,
        tokenizer=preparation.tokenizer,
        template=template,
        source=source,
        first=None if questions.limit is None else len(exam),
    )
