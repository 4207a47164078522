"""What the verb `ask` does: one question, a file of questions, or a chat, and the results as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.choices import Template
from megatron_deepstack.errors import DataError
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.ask.chat import HELP, chat
from megatron_deepstack.inference.ask.launch import Conversation, Manner, Reply, converse
from megatron_deepstack.inference.ask.preparation import Asked, Preparation
from megatron_deepstack.inference.question_file import read_questions

_TOGETHER: Final = 32
"""Questions of a file that are prepared and answered together; their pictures are in memory meanwhile."""


@dataclass(frozen=True, slots=True)
class Session:
    """A run or a folder of weights that is asked."""

    answerer: Answerer
    preparation: Preparation
    manner: Manner

    @classmethod
    def of(cls, answerer: Answerer, manner: Manner, say: Callable[[str], None]) -> Session:
        """Look at a run, or at a folder of weights, before any rank starts.

        Args:
            answerer: The run or folder.
            manner: How questions are answered.
            say: Called with a line where something is unusual.

        Returns:
            The session.

        Raises:
            CheckpointError: A run has no checkpoint.
            ConfigError: There is no tokenizer.
            DataError: The tokenizer cannot be read, or is another than the model's.
        """
        answerer.require_weights()
        return cls(answerer, answerer.preparation("ask", say), manner)

    def ask_one(self, question: str, pictures: Sequence[str], shown: Callable[[str], None] | None) -> Reply:
        """Ask one question. What is wrong with it is said before ranks start.

        Args:
            question: Its text.
            pictures: Paths or URLs.
            shown: Called with each piece of the answer, and a line's end after it; None shows nothing.

        Returns:
            The answer.

        Raises:
            DataError: The question is empty, a picture cannot be used, or the prompt is too long.
        """
        if not question.strip() and self.preparation.template is not Template.PLAIN:
            raise DataError("the question is empty; write it in quotes after the run and the pictures")
        asked = Asked(question, tuple(pictures))
        prepared = self.preparation.prepare(asked)
        replies: list[Reply] = []

        def talk(conversation: Conversation) -> None:
            replies.append(conversation.ask_prepared(asked, prepared, shown or (lambda text: None)))
            if shown is not None:
                shown("\n")

        converse(self.answerer, self.preparation, self.manner, talk)
        return replies[0]

    def ask_file(self, file: Path, images: str | None, shown: Callable[[str], None] | None) -> list[Reply]:
        """Ask all questions of a file. One that cannot be asked does not keep the others from their answers.

        Args:
            file: The file.
            images: Folder of its pictures.
            shown: Called with a line per answer; None shows nothing.

        Returns:
            The replies, in the file's order.
        """
        questions = [Asked(one.text, one.pictures, id=one.id) for one in read_questions(file, images)]
        replies: list[Reply] = []

        def talk(conversation: Conversation) -> None:
            for first in range(0, len(questions), _TOGETHER):
                answered = conversation.ask_all(questions[first : first + _TOGETHER])
                for reply in answered if shown is not None else ():
                    assert shown is not None
                    shown(f"{reply.asked.id}: {reply.answer if reply.error is None else f'({reply.error})'}")
                replies.extend(answered)

        converse(self.answerer, self.preparation, self.manner, talk)
        return replies

    def chat(
        self,
        lines: Iterable[str],
        pictures: Sequence[str],
        shown: Callable[[str], None],
        said: Callable[[str], None],
    ) -> None:
        """Answer the lines of a user until they end, see `chat.chat`. The ranks are started before and ended after.

        Args:
            lines: What the user types.
            pictures: Pictures of the first question.
            shown: Called with each piece of an answer.
            said: Called with a line about the chat itself: help, and what is wrong with a question.

        Raises:
            DataError: One of `pictures` cannot be used.
        """

        def talk(conversation: Conversation) -> None:
            said(HELP)
            chat(conversation, lines, pictures, shown, said)

        for picture in pictures:
            self.preparation.read(picture)
        converse(self.answerer, self.preparation, self.manner, talk)

    @staticmethod
    def document(reply: Reply) -> dict[str, Any]:
        """A reply as JSON."""
        return {
            "id": reply.asked.id or None,
            "question": reply.asked.text,
            "pictures": [picture for picture in reply.asked.pictures if isinstance(picture, str)],
            "answer": reply.answer if reply.error is None else None,
            "ended": reply.ended,
            "error": reply.error,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
            "seconds": round(reply.seconds, 3),
        }
