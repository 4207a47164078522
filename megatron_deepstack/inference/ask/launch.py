"""`ask` in the process of the user: ranks are started, and questions go to them as they come, from a file or a chat.

Ranks are started in the main thread, which can stop them; the talk with them and with the user is in a thread beside.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_deepstack.data.text.conversation import stop_ids
from megatron_deepstack.errors import DataError
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.ask.preparation import Asked, Preparation, Prepared
from megatron_deepstack.inference.ask.rank import Batch, Scoring, serve
from megatron_deepstack.inference.ask.text import StopWords, TextStream
from megatron_deepstack.inference.sampling import GREEDY, Sampling
from megatron_deepstack.platform.processes.local_ranks import launch_ranks

_STOPPED = "ask: stopped on request"
_LOOK_SECONDS = 0.5
"""Time after which it is looked whether the ranks still live."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How questions are answered."""

    max_new_tokens: int = 128
    """Longest answer; it also ends with the model's context."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and do not belong to it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A question with its answer, or with the reason why there is none."""

    asked: Asked
    answer: str
    ended: str
    """`stop`: by the model or a stop word; `length`: the longest answer, or the end of the context, was reached;
    `error`: the question could not be asked."""
    prompt_tokens: int = 0
    """Positions of the prompt, without visual ones."""
    new_tokens: int = 0
    seconds: float = 0.0
    """Time from the question to the end of its batch."""
    error: str | None = None


class Conversation:
    """What the thread of the user sees: questions in, answers out."""

    def __init__(self, preparation: Preparation, manner: Manner, connection: Connection) -> None:
        self.preparation, self.manner = preparation, manner
        self._connection, self._asked = connection, 0
        self._stop_ids = stop_ids(preparation.template, preparation.tokenizer)

    @property
    def _words(self) -> StopWords:
        return StopWords(self.manner.stop, self.preparation.tokenizer)

    def ask(self, asked: Asked, shown: Callable[[str], None] = lambda text: None) -> Reply:
        """Ask one question.

        Args:
            asked: The question.
            shown: Called with each piece of the answer as it comes.

        Returns:
            The whole answer.

        Raises:
            DataError: A picture or the prompt cannot be used.
        """
        return self.ask_prepared(asked, self.preparation.prepare(asked), shown)

    def ask_prepared(self, asked: Asked, prepared: Prepared, shown: Callable[[str], None] = lambda text: None) -> Reply:
        """Ask one question whose pictures have been read.

        Args:
            asked: The question.
            prepared: The same question as token ids and views.
            shown: Called with each piece of the answer as it comes.

        Returns:
            The whole answer.
        """
        stream = TextStream(self._words)

        def told(tokens: list[int]) -> None:
            if tokens[0] not in self._stop_ids:
                shown(stream.add(tokens[0]))

        (reply,) = self._ask([asked], [prepared], told)
        shown(stream.rest())
        return reply

    def ask_all(self, batch: Sequence[Asked]) -> list[Reply]:
        """Ask questions together. A question that cannot be asked gets a reply that says why."""
        ready: list[tuple[int, Prepared]] = []
        replies: dict[int, Reply] = {}
        for place, asked in enumerate(batch):
            try:
                ready.append((place, self.preparation.prepare(asked)))
            except DataError as error:
                replies[place] = Reply(asked, "", "error", error=str(error))
        if ready:
            answered = self._ask([batch[place] for place, _ in ready], [prepared for _, prepared in ready])
            replies.update(zip((place for place, _ in ready), answered, strict=True))
        return [replies[place] for place in range(len(batch))]

    def _ask(
        self,
        asked: Sequence[Asked],
        prepared: Sequence[Prepared],
        told: Callable[[list[int]], None] = lambda tokens: None,
    ) -> list[Reply]:
        started = time.monotonic()
        batch = Batch(
            questions=tuple(prepared),
            first_number=self._asked,
            max_new_tokens=self.manner.max_new_tokens,
            stop_ids=self._stop_ids,
            stop_words=self._words,
            sampling=self.manner.sampling,
        )
        self._asked += len(asked)
        self._connection.send(batch)
        while isinstance(message := self._connection.recv(), list):
            told(message)
        seconds = time.monotonic() - started
        return [self._reply(a, p, ids, seconds) for a, p, ids in zip(asked, prepared, message, strict=True)]

    def score(self, batch: Sequence[tuple[Asked, str]]) -> list[tuple[float, bool]]:
        """How likely given answers are.

        Args:
            batch: Questions, each with an answer to it.

        Returns:
            For each the logarithm of the answer's probability, without the end of the turn, and whether greedy
            decoding would give that answer's tokens.

        Raises:
            DataError: A question cannot be asked, or is too long with its answer.
        """
        prepared = [self.preparation.prepare_answered(asked, answer) for asked, answer in batch]
        self._connection.send(Scoring(tuple(one for one, _ in prepared), tuple(ids for _, ids in prepared)))
        return list(self._connection.recv())

    def _reply(self, asked: Asked, prepared: Prepared, ids: list[int], seconds: float) -> Reply:
        text = self.preparation.tokenizer.decode(ids)
        cut = self._words.before(text)
        full = len(ids) == min(self.manner.max_new_tokens, prepared.room) and cut == text
        return Reply(
            asked,
            cut.strip(),
            "length" if full else "stop",
            prompt_tokens=int((prepared.prompt >= 0).sum()),
            new_tokens=len(ids),
            seconds=seconds,
        )


def converse(
    answerer: Answerer, preparation: Preparation, manner: Manner, talk: Callable[[Conversation], None]
) -> None:
    """Start the ranks of one replica, and let `talk` ask them. To be called in the main thread.

    Args:
        answerer: The run or folder of weights.
        preparation: How questions are prepared.
        manner: How they are answered.
        talk: Called in a thread of its own once the model is loaded; when it returns the ranks end.

    Raises:
        DeepStackError: What `talk` or a rank raised.
        PreemptedError: The process was asked to stop.
    """
    answerer = answerer.without_sequence_parallelism()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            ours.recv()  # the model is loaded
            talk(Conversation(preparation, manner, ours))
        except (EOFError, OSError):
            pass  # the ranks have ended, and the main thread learns why
        except BaseException as error:
            failures.append(error)
        finally:
            with suppress(OSError):  # ranks that were stopped do not listen any more
                ours.send(None)

    threading.Thread(target=run, daemon=True).start()
    launch_ranks(serve, answerer.num_ranks, answerer, preparation, theirs, stopped=_STOPPED)
    if failures:
        raise failures[0]


class OpenRanks:
    """The ranks of one replica in the background, for a program that asks now and then; a context manager."""

    def __init__(self, answerer: Answerer, preparation: Preparation, manner: Manner) -> None:
        """Start the ranks and wait until they are ready.

        Args:
            answerer: The run or folder of weights.
            preparation: How questions are prepared.
            manner: How they are answered, until `conversation.manner` is set to something else.

        Raises:
            DeepStackError: What a rank raised.
        """
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._failures: list[BaseException] = []
        arguments = (answerer.without_sequence_parallelism(), preparation, theirs)
        self._connection = Watched(ours, self._check)
        self._thread = threading.Thread(target=self._run, args=(answerer.num_ranks, arguments), daemon=True)
        self._thread.start()
        self._connection.recv()
        self.conversation = Conversation(preparation, manner, self._connection)  # type: ignore[arg-type]

    def _run(self, num_ranks: int, arguments: tuple[Any, ...]) -> None:
        try:
            launch_ranks(serve, num_ranks, *arguments, stopped=_STOPPED)
        except BaseException as error:
            self._failures.append(error)

    def _check(self) -> None:
        """Raise what ended the ranks, if they have ended."""
        if self._failures:
            raise self._failures[0]

    def close(self) -> None:
        """End the ranks, and wait until they have ended."""
        self._connection.send(None)
        self._thread.join()

    def __enter__(self) -> OpenRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Watched:
    """A connection whose other end may die: while it waits, it looks whether there is still somebody to wait for."""

    def __init__(self, connection: Connection, check: Callable[[], None]) -> None:
        self._connection, self._check = connection, check

    def send(self, message: Any) -> None:
        """As a connection's."""
        self._check()
        self._connection.send(message)

    def recv(self) -> Any:
        """As a connection's. Raises what ended the other side."""
        while not self._connection.poll(_LOOK_SECONDS):
            self._check()
        return self._connection.recv()
