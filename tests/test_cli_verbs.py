"""What `--help` shows, completion, JSON on stdout, and the verbs that come before anything starts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.cli.catalogue import EXAMPLES, GROUPS, PROGRAM, group_of
from megatron_deepstack.cli.output import complete_recipe, recipe_names, stdout_for_results
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.planning.shipped import shipped_recipes

WIDE = {"COLUMNS": "200"}


def verbs(command: Any = None, context: Any = None) -> Iterator[tuple[str, Any]]:
    """Path and command of every verb, groups included."""
    command = command or typer.main.get_command(app)
    context = context or click.Context(command, info_name=PROGRAM)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        path = name if context.parent is None else f"{context.info_name} {name}"
        yield path, inner
        if hasattr(inner, "list_commands"):
            yield from verbs(inner, click.Context(inner, info_name=name, parent=context))


VERBS = dict(verbs())


def test_every_verb_has_its_place_and_examples() -> None:
    assert {verb: group_of(verb) for verb in VERBS if group_of(verb) == "More"} == {}
    assert set(VERBS) - set(EXAMPLES) == set()


def test_verbs_are_listed_in_the_order_of_the_work() -> None:
    said = CliRunner().invoke(app, ["--help"], env=WIDE).output
    titles = [group.title for group in GROUPS if not group.verbs[0].startswith("store ")]
    places = [said.index(f" {title} ") for title in titles]
    assert places == sorted(places)
    names = ["doctor", "recipes", "plan", "draw", "preprocess", "train", "launch", "generate", "report", "export"]
    rows = [said.index(f"│ {name} ") for name in names]
    assert rows == sorted(rows)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_examples_without_broken_lines(verb: str, flag: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), flag], env=WIDE)
    assert result.exit_code == 0
    for example in EXAMPLES[verb]:
        assert f"{PROGRAM} {example}" in result.output


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_examples_are_commands_that_the_program_takes(example: str) -> None:
    """Parsed, not run: an option that has gone or a missing argument fails here."""
    context = click.Context(typer.main.get_command(app), info_name=PROGRAM)
    command, words = context.command, shlex.split(example)
    while hasattr(command, "list_commands"):
        name = words.pop(0)
        command = command.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, name
        context = click.Context(command, info_name=name, parent=context)
    command.make_context(command.name or "", words, parent=context.parent)


def complete(words: str, folder: Path) -> list[str]:
    """What bash would offer for the last of the words."""
    environment = {
        **os.environ,
        "_MEGATRON_DEEPSTACK_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{PROGRAM} {words}",
        "COMP_CWORD": str(len(f"{PROGRAM} {words}".split()) - (0 if words.endswith(" ") else 1)),
    }
    program = Path(sys.executable).with_name(PROGRAM)
    done = subprocess.run(
        [str(program)], env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_verbs_and_recipes(tmp_path: Path) -> None:
    assert complete("pre", tmp_path) == ["preprocess"]
    assert complete("plan dem", tmp_path) == ["demo"]
    assert "--json" in complete("plan demo --", tmp_path)


def test_recipes_and_files_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("demo-of-mine.yaml", "demo.txt", "mine/a.yaml"):
        (tmp_path / name).write_text("")
    assert complete_recipe("demo") == ["demo", "demo-of-mine.yaml"]
    assert complete_recipe("mine/") == ["mine/a.yaml"]
    assert complete_recipe("nowhere/x") == []


def test_recipes_lists_each_in_a_line() -> None:
    result = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "250"})
    lines = [line for line in result.output.splitlines()[1:] if line.strip()]
    assert [line.split()[0] for line in lines] == recipe_names()
    found = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)["recipes"]
    assert [one["name"] for one in found] == recipe_names()
    (large,) = (one for one in found if one["name"] == "deepstack_hd_13b_finetune")
    assert (large["layout"], large["ranks_per_replica"], large["made_for"]) == ("TP 2 x PP 4", 8, "Eight H100")
    assert all(one.about for one in shipped_recipes())


def test_a_recipe_that_is_printed_is_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipes", "demo", "train.steps=7"])
    file = tmp_path / "mine.yaml"
    file.write_text(result.stdout)
    assert load_recipe(file) == load_recipe("demo", ["train.steps=7"])
    assert json.loads(CliRunner().invoke(app, ["recipes", "demo", "--json"]).stdout)["name"] == "demo"
    result = CliRunner().invoke(app, ["recipes", "dem"])
    assert (result.exit_code, "did you mean 'demo'" in result.output) == (2, True)


def test_plan_as_json() -> None:
    result = CliRunner().invoke(app, ["plan", "demo", "--json", "--ranks", "4"])
    found = json.loads(result.stdout)
    assert (found["ranks"], found["ranks_per_replica"], found["layout"]["data"]) == (4, 2, 2)
    assert [stage["layers"] for stage in found["stages"]] == [[0, 1], [2, 3]]
    assert [[pair["stack"] for pair in stage["stacks"]] for stage in found["stages"]] == [[0, 1], [2, 3]]
    vit = json.loads(CliRunner().invoke(app, ["plan", "deepstack_v_7b_finetune", "--json"]).stdout)
    assert vit["vit_stacks"] == {"slots": [20, 21, 22, 23], "dropped": []}


def test_with_json_a_mistake_leaves_stdout_empty() -> None:
    result = CliRunner().invoke(app, ["plan", "demo", "train.stepz=1", "--json"])
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("columns", [30, 40, 50])
def test_a_narrow_plan_is_not_cut_into_syllables(columns: int) -> None:
    output = CliRunner().invoke(app, ["plan", "demo"], env={"COLUMNS": str(columns)}).output
    assert "stage 0: layers 0 to 1" in output
    assert "holds embedding" in output


def test_what_others_print_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_for_results(True):
        os.write(1, b"a library's banner\n")
    os.write(1, b"the result\n")
    assert capfd.readouterr() == ("the result\n", "a library's banner\n")
