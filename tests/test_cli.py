"""The command line as a user meets it: a process, its output, its exit code, and nothing heavy behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.errors import StoreError

ENVIRONMENT = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_deepstack.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=240)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: trial\nmodel: {language: {num_layers: 8}, stacks: {slots: [0, 3, 5, 7]}}\n")
    return str(file)


QUICK = {
    "help": (("--help",), 0, "check-reference"),
    "nothing": ((), 2, "Before anything starts"),
    "version": (("--version",), 0, "0.1"),
    "help of a verb": (("train", "--help"), 0, "--stop-after"),
    "typo in a verb": (("trian",), 2, "Did you mean 'train'?"),
    "typo in an option": (("train", "demo", "--rank", "2"), 2, "--ranks"),
    "bad value of an option": (("train", "demo", "--ranks", "two"), 2, "--ranks"),
    "recipe that is not there": (("train", "nowhere"), 2, "recipe 'nowhere': no such file"),
    "typo in a key": (("train", "RECIPE", "train.stepz=3"), 2, "did you mean 'train.steps'?"),
    "bad value of a key": (("train", "RECIPE", "parallel.recompute=ful"), 2, "did you mean 'full'?"),
    "slot outside": (("train", "RECIPE", "model.stacks.slots=[0,3,5,8]"), 2, "stack 3 has slot 8, outside the model"),
    "layout": (("train", "RECIPE", "parallel.pipeline=3"), 2, "8 decoder layers do not split evenly over 3 chunks"),
    "ranks": (("train", "RECIPE", "data.store=s", "parallel.pipeline=2", "--ranks", "3"), 2, "there are 3"),
    "no store": (("train", "RECIPE"), 2, "data.store: is not set, and `train` needs it"),
    "no records": (("preprocess", "RECIPE"), 2, "data.records: is not set, and `preprocess` needs it"),
    "no run": (("generate", "nowhere"), 2, "nowhere: holds no recipe.yaml"),
    "nothing to compare": (("check-reference",), 2, "nothing to compare"),
    "half a comparison": (("check-reference", "--crops", "x"), 2, "--photos is needed too"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), QUICK.values(), ids=QUICK)
def test_answers(recipe, arguments, code, words):
    arguments = tuple(recipe if argument == "RECIPE" else argument for argument in arguments)
    done = run(*arguments)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == code, said
    assert words in said.replace("│ ", "").replace(" │", "")
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["runs #1", "2024", "run: a", "a=b", "${x}"])
def test_generate_takes_the_folder_of_a_run_as_it_is(recipe, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Path(recipe).rename(Path(name) / "recipe.yaml")
    result = CliRunner().invoke(app, ["generate", name, "--store", "s"])
    assert (result.exit_code, f"{name}: holds no checkpoint" in result.output) == (5, True)


def test_what_torchrun_decides_is_refused_beside_it(recipe, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--ranks", "4", "--restarts", "3"]
    result = CliRunner().invoke(app, ["train", recipe, "data.store=s", *options])
    assert result.exit_code == 2
    assert "--ranks 4: torchrun has started 2 already; leave it out" in result.output
    assert "--restarts 3: a rank cannot start the others again; leave it out" in result.output
    assert "torchrun --max-restarts=3" in result.output


@pytest.mark.parametrize(
    ("rank", "of_rank", "agreed", "title"),
    [
        (None, None, False, "error"),
        (None, 3, False, "error on rank 3 (there)"),
        ("1", None, False, "error"),
        ("1", 1, False, "error on rank 1 (there)"),
        ("1", 1, True, "error on rank 1 (there)"),
        ("0", 1, True, None),
        ("0", None, True, "error"),
        ("1", None, True, None),
    ],
)
def test_each_error_is_said_by_one_rank_and_swallowed_by_none(monkeypatch, capsys, rank, of_rank, agreed, title):
    """What a rank meets alone it says; what all raise the rank says that met it, or the first."""
    from megatron_deepstack.cli.app import _fail

    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    error = StoreError("it is gone")
    error.rank, error.host, error.agreed = of_rank, None if of_rank is None else "there", agreed
    with pytest.raises(typer.Exit) as caught:
        _fail(error)
    assert caught.value.exit_code == StoreError.exit_code
    said = capsys.readouterr().err
    assert said == ("" if title is None else f"{title}\n  it is gone\n")


def test_all_problems_at_once(recipe):
    done = run("train", recipe, "train.stepz=3", "parallel.tensor=5", "optimizer.lr=fast", "model.stacks.start=-1")
    for words in ("5 problems", "train.stepz", "parallel.tensor: 5 ", "optimizer.lr: found 'fast'", "start: found -1"):
        assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [(("train", "RECIPE", "train.stepz=3"), 2, "ConfigError"), (("store", "verify", "nowhere"), 4, "StoreError")],
    ids=["a verb", "a verb in a group"],
)
def test_debug_shows_the_traceback_and_leaves_as_without_it(recipe, arguments, code, kind):
    arguments = tuple(recipe if argument == "RECIPE" else argument for argument in arguments)
    plain, debug = run(*arguments), run("--debug", *arguments)
    assert (plain.returncode, debug.returncode) == (code, code)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert kind in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


@pytest.mark.parametrize(
    ("words", "verb", "seam"),
    [
        (["store", "verify", "a.zarr"], "store verify", "megatron_deepstack.storekeeping.verify.verify"),
        (["status", "run"], "status", "orchestration.launch.driver.control.status_of"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ctrl_c_is_said_in_the_words_of_the_verb(monkeypatch, words, verb, seam):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(seam, interrupted)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130
    assert result.stderr == f"{verb}: stopped on request before it was done; the same command starts again\n"


def test_markup_in_a_message_is_text(tmp_path):
    done = run("plan", "[/red][bold]x")
    assert "recipe '[/red][bold]x': no such file" in done.stderr


@pytest.mark.parametrize("name", ["x [/y]", "run [v2]", "1:100:3"])
def test_markup_in_the_name_of_a_recipe_is_text(recipe, name):
    result = CliRunner().invoke(app, ["plan", recipe, f"name='{name}'"], env={"COLUMNS": "100"})
    assert (result.exit_code, f"Stage plan of {name}" in result.output) == (0, True)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, megatron_deepstack.cli;"
        "heavy = {'torch', 'numpy', 'ray', 'transformers', 'zarr', 'PIL', 'omegaconf'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_shows_stages_and_stacks(recipe):
    result = CliRunner().invoke(app, ["plan", recipe, "parallel.pipeline=2"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.replace("│", " ").split()) for line in result.output.splitlines()]
    assert "0 0 to 3 0 at 0, 1 at 3 embedding E0··1" in rows
    assert "1 4 to 7 2 at 5, 3 at 7 head ·2·3" in rows


def test_plan_shows_what_falls_out_of_the_vit(recipe):
    overrides = ["model.variant=deepstack_v", "model.stacks.grid=fixed_2x2", "model.stacks.slots=[21,22,23,24]"]
    result = CliRunner().invoke(app, ["plan", recipe, *overrides], env={"COLUMNS": "200"})
    assert "stacks enter before layers 21, 22, 23, stack 3 finds no layer" in result.output
