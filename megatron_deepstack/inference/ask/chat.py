"""A chat: each line is a question, and what was said before stays in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.errors import DataError
from megatron_deepstack.inference.ask.launch import Conversation
from megatron_deepstack.inference.ask.preparation import Asked
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

HELP: Final = "A line is a question. /picture FILE adds a picture to the next one, /new starts a new chat, /quit ends."


def chat(
    conversation: Conversation,
    lines: Iterable[str],
    pictures: Sequence[str],
    shown: Callable[[str], None],
    said: Callable[[str], None],
) -> None:
    """Answer the lines of a user until they end.

    Args:
        conversation: The ranks.
        lines: What the user types.
        pictures: Pictures of the first question.
        shown: Called with each piece of an answer.
        said: Called with a line about the chat itself: help, and what is wrong with a question.
    """
    history: tuple[Turn, ...] = ()
    seen: tuple[str, ...] = ()
    waiting = tuple(pictures)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            history, seen, waiting = (), (), ()
            said("a new conversation")
        elif command == "/picture" and rest.strip():
            waiting = _with_picture(conversation, waiting, rest.strip(), said)
        elif command.startswith("/"):
            said(HELP)
        elif command:
            text = f"{IMAGE_TOKEN}\n" * (len(waiting) - line.count(IMAGE_TOKEN)) + line.strip()
            try:
                reply = conversation.ask(Asked(text, (*seen, *waiting), history), shown)
            except DataError as error:
                said(str(error))
                continue
            shown("\n")
            history = (*history, Turn(Role.HUMAN, text), Turn(Role.GPT, reply.answer))
            seen, waiting = (*seen, *waiting), ()


def _with_picture(
    conversation: Conversation, waiting: tuple[str, ...], picture: str, said: Callable[[str], None]
) -> tuple[str, ...]:
    try:
        conversation.preparation.read(picture)
    except DataError as error:
        said(str(error))
        return waiting
    said(f"{picture} belongs to the next question")
    return (*waiting, picture)
