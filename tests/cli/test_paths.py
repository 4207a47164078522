"""`~` on the command line: the home folder for every path of every verb, however it is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.cli.paths import expand_homes, path_parameters
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe

NO_PATHS = {"overrides", "address", "naming", "adapters", "name", "words", "question", "stop", "metric", "gpu", "to"}
"""Texts that a verb takes and that name no file."""


def verbs(application: typer.Typer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for info in application.registered_commands:
        yield f"{prefix}{info.callback.__name__}", info.callback
    for group in application.registered_groups:
        yield from verbs(group.typer_instance, f"{group.name} ")


VERBS = dict(verbs(app))


@pytest.mark.parametrize("verb", VERBS)
def test_each_text_of_a_verb_is_a_path_or_known_to_be_none(verb: str) -> None:
    """A new parameter that is a path is a Path, or a text annotated with a PathKind; any other text is listed above."""
    hints = get_type_hints(VERBS[verb])
    texts = {name for name, hint in hints.items() if name != "return" and ("str" in str(hint) or "Path" in str(hint))}
    assert texts - NO_PATHS == set(path_parameters(VERBS[verb]))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_files_are_read_and_written_at_home(home: Path) -> None:
    (home / "my.yaml").write_text("name: mine\ntrain: {steps: 5}\n")
    assert invoke("plan", "~/my.yaml", "--svg=~/plan.svg")[0] == 0
    assert (home / "plan.svg").is_file()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "~/run"), "/home/run: holds no recipe.yaml"),
        (("store", "verify", "~/st.zarr"), "/home/st.zarr"),
        (("store", "merge", "~/out", "~/a", "~/b"), "/home/a"),
        (("report", "~/one", "~/two"), "/home/one"),
        (("check-reference", "--conversations=~/c.json", "--tokenizer=~/t.model"), "/home/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_arguments_and_options(home: Path, arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)
    assert "~" not in result.output
    assert list(Path.cwd().iterdir()) == []


def test_a_store_at_home_in_an_option_with_equals(home: Path) -> None:
    run = home / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_to_yaml(Recipe()))
    code, said = invoke("generate", "~/run", "--store=~/heldout.zarr")
    assert (code, f"{run}: holds no checkpoint" in said) == (5, True)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (
            "~nobody-has-this-name/x",
            "run: found '~nobody-has-this-name/x', expected a path; no home folder is known of",
        ),
        ("$HOME/x", "run: found '$HOME/x', expected a path; shell variables are not replaced here: write it out"),
    ],
)
def test_what_no_home_folder_is_known_of(home: Path, word: str, words: str) -> None:
    code, said = invoke("generate", word)
    assert code == 2
    assert words in said


def test_urls_and_lists_and_nothing(home: Path) -> None:
    seen: list[object] = []
    small = typer.Typer()

    @small.command()
    def look(one: Path, many: list[Path], other: Path | None = None) -> None:
        seen.extend([one, many, other])

    expand_homes(small)
    assert CliRunner().invoke(small, ["~", "~/a", "b/~"]).exit_code == 0
    assert seen == [home, [home / "a", Path("b/~")], None]
