"""Options that messages name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from megatron_deepstack.cli import app

ROOT = Path(__file__).resolve().parents[1]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OF_OTHER_PROGRAMS = {
    "--nnodes": "torchrun",
    "--nproc-per-node": "torchrun",
    "--max-restarts": "torchrun",
    "--master-port": "torchrun",
    "--standalone": "torchrun",
    "--constraint": "pip",
    "--ipc": "docker",
    "--shm-size": "docker",
}
"""Options that messages name beside the program they belong to."""
NOT_THE_COMMAND_LINES = ("orchestration/manifests", "megatron_deepstack/testing", "megatron_deepstack/inference/lmms")
"""They speak of the commands of other programs."""


def options_of(command: click.Command) -> Iterator[str]:
    """Every option of a command and of the commands below it."""
    for parameter in command.params:
        yield from parameter.opts
        yield from parameter.secondary_opts
    for below in getattr(command, "commands", {}).values():
        yield from options_of(below)


def messages_of(source: str) -> Iterator[tuple[int, str]]:
    """Every text in a module with its line, but for docstrings."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def test_options_in_messages_are_options_of_a_verb() -> None:
    known = {*options_of(typer.main.get_command(app)), "--help", *OF_OTHER_PROGRAMS}
    named, unknown = set(), []
    for package in ("megatron_deepstack", "orchestration"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith(NOT_THE_COMMAND_LINES):
                continue
            for line, text in messages_of(path.read_text(encoding="utf-8")):
                for option in OPTION.findall(text):
                    named.add(option)
                    if option not in known:
                        unknown.append(f"{place}:{line}: {option} in {text!r}")
    assert not unknown, "\n".join(["no verb has these options:", *unknown])
    assert {"--ranks", "--sample", "--tokenizer"} <= named, "the search finds what is there"


def test_the_search_sees_an_option_that_is_none() -> None:
    source = '"""About --docs."""\nfound = f"{1}: give --images {2}"\n'
    assert [option for _, text in messages_of(source) for option in OPTION.findall(text)] == ["--images"]
