"""Tools in conversations, as text in the form that Qwen's models are trained with.

A template that writes tools needs no turns of other kinds: the tools are part of the system text, a call is part of
what the assistant says, and the responses to it are what the human says next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from megatron_deepstack.data.records.keys import FaultError, check_keys, holds_nothing
from megatron_deepstack.data.records.turns import Role, Turn

RESPONSE_ROLES: Final = ("tool", "tool_response", "function", "observation", "ipython")
"""Roles of turns that hold what a tool responded."""
CALL_ROLES: Final = ("tool_call", "function_call")
"""Roles of turns that hold one call, as a JSON text."""
CALL_BEGIN: Final = '<tool_call>\n{"name": "'
CALL_END: Final = "}\n</tool_call>"
RESPONSE_BEGIN, RESPONSE_END = "<tool_response>\n", "\n</tool_response>"
BEFORE_TOOLS: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
AFTER_TOOLS: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def with_tools(turns: list[Turn], tools: Any) -> list[Turn]:
    """Return a conversation whose system text offers tools, and whose calls and responses are joined with neighbours.

    Args:
        turns: The conversation.
        tools: The record's tools: a list of descriptions, the same as a JSON text, or nothing.

    Returns:
        The conversation.

    Raises:
        FaultError: `tools` is something else.
    """
    joined: list[Turn] = []
    for turn in turns:
        text = _continuation(joined[-1], turn) if joined else None
        if text is None:
            joined.append(turn)
        else:
            joined[-1] = replace(joined[-1], text=text)
    listed = _listed(tools)
    if not listed:
        return joined
    offer = BEFORE_TOOLS + "".join(f"\n{_json(tool)}" for tool in listed) + AFTER_TOOLS
    if joined and joined[0].role is Role.SYSTEM:
        return [Turn(Role.SYSTEM, f"{joined[0].text}\n\n{offer}"), *joined[1:]]
    return [Turn(Role.SYSTEM, offer), *joined]


def _continuation(before: Turn, turn: Turn) -> str | None:
    """The text of both turns as one, if the second only goes on with the first."""
    if before.role is not turn.role or before.learned is not turn.learned:
        return None
    if turn.role is Role.HUMAN and before.text.endswith(RESPONSE_END) and turn.text.startswith(RESPONSE_BEGIN):
        return f"{before.text}\n{turn.text}"
    if turn.role is Role.GPT and turn.text.startswith(CALL_BEGIN):
        return f"{before.text}\n{turn.text}" if before.text else turn.text
    return None


def response(text: str) -> str:
    """Return what a tool responded as the human says it."""
    return f"{RESPONSE_BEGIN}{text}{RESPONSE_END}"


def with_calls(text: str, calls: Any, where: str) -> str:
    """Return what the assistant says together with its calls of tools.

    Args:
        text: What it says before; may be empty.
        calls: A list of calls: objects with `name` and `arguments`, or with a `function` that holds them.
        where: The place of the turn, for messages.

    Returns:
        The text.

    Raises:
        FaultError: A call is something else.
    """
    if not isinstance(calls, list):
        raise FaultError(f"{where} has {calls!r} as `tool_calls`; a list of calls was expected")
    return "\n".join([*([text] if text else []), *(_call(call, where) for call in calls)])


def call_in_text(text: str, where: str) -> str:
    """Return the call that a turn holds as a JSON text.

    Args:
        text: One call as JSON, or a list of calls.
        where: The place of the turn, for messages.

    Returns:
        The calls as the assistant writes them.

    Raises:
        FaultError: The text is no call.
    """
    try:
        call = json.loads(text)
    except ValueError as error:
        raise FaultError(f"{where} is a call of a tool, and no JSON: {error}") from error
    return "\n".join(_call(one, where) for one in (call if isinstance(call, list) else [call]))


def _call(call: Any, where: str) -> str:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        check_keys({key for key, value in call.items() if not holds_nothing(value)}, ("type", "function"), where)
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise FaultError(f"{where} calls a tool with {call!r}; an object with `name` and `arguments` was expected")
    check_keys(call.keys(), ("name", "arguments"), where)
    arguments = call.get("arguments", {})
    written = arguments if isinstance(arguments, str) else _json(arguments)
    return f'{CALL_BEGIN}{call["name"]}", "arguments": {written}{CALL_END}'


def _listed(tools: Any) -> Sequence[Any]:
    if holds_nothing(tools):
        return ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise FaultError(f"has `tools` that are a text, and no JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise FaultError(f"has {tools!r} as `tools`; a list of objects was expected")
    return tools


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
