"""Two real ranks of two stages under torchrun: success, and each kind of error at the start, told once by its rank.

What differs between nodes is played by a path that holds the rank's number on its machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import DataConfig, ParallelConfig
from megatron_deepstack.platform.files.run_lock import run_lock
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.tiny_store import write_tiny_store

DEADLINE_SECONDS = 240.0
RANK = "${oc.env:LOCAL_RANK}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two steps on `store0`, which is all that "the first node" has."""
    folder = tmp_path_factory.mktemp("torchrun")
    write_tiny_store(folder / "store0")
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    recipe = replace(
        recipe,
        run_dir=str(folder / "run"),
        data=DataConfig(store=str(folder / "store0")),
        train=replace(recipe.train, steps=2),
    )
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    return folder


def torchrun(folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code, and what was printed without torchrun's own words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_deepstack.cli", "train", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "1000", "NO_COLOR": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=DEADLINE_SECONDS
    )
    return done.returncode, done.stdout + done.stderr


def exit_codes(said: str) -> list[int]:
    """Of the ranks, from torchrun's summary."""
    return [int(code) for code in re.findall(r"^ +exitcode +: (-?\d+)", said, flags=re.MULTILINE)]


def ours(said: str) -> str:
    """What came before torchrun's own report of the failure, without the log lines of torch."""
    before = re.split(r"^.*failed \(exitcode", said, flags=re.MULTILINE)[0]
    return "\n".join(line for line in before.splitlines() if not re.match(r"[WIE]\d{4} |\[[WIE]\d{4}", line))


@pytest.mark.slow
def test_two_ranks_train_and_are_then_done(folder: Path) -> None:
    code, said = torchrun(folder)
    assert code == 0, said
    assert "saved" in said
    assert (folder / "run" / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert not list((folder / "run").glob(".run.owner*")), "the lock was given back"


def in_a_file(folder: Path) -> str:
    (folder / "in_the_way").write_text("")
    return str(folder / "in_the_way")


FAULTS: dict[str, tuple[Callable[[Path], tuple[str, ...]], int, str]] = {
    "store missing on one node": (
        lambda folder: (f"data.store={folder}/store{RANK}",),
        4,
        r"error on rank 1 \(\S+\)\n  \S*store1: no such folder",
    ),
    "tokenizer missing on one node": (
        lambda folder: (f"data.tokenizer={folder}/gone{RANK}",),
        3,
        r"error on rank 0 \(\S+\)\n  \S*gone0: the tokenizer cannot be read",
    ),
    "starting weights missing": (
        lambda folder: (f'train.init_from=["{folder}/gone{RANK}"]',),
        5,
        r"error on rank 0 \(\S+\)\n  \S*gone0: no such file or folder",
    ),
    "a recipe that only one rank can read": (
        lambda folder: (f"train.precision=fp{RANK}",),
        2,
        r"error on rank 0 \(\S+\)\n  train.precision: ",
    ),
    "a typo": (lambda folder: ("train.stepz=3",), 2, r"error\n  .*did you mean 'train.steps'"),
    "no Transformer Engine": (
        lambda folder: ("model.layers=transformer_engine",),
        2,
        r"error\n  model.layers: transformer_engine needs a GPU",
    ),
    "a run folder that is a file": (
        lambda folder: (f"run_dir={in_a_file(folder)}",),
        12,
        r"error on rank 0 \(\S+\)\n  run_dir: \S*in_the_way cannot be written",
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name.startswith("store") else pytest.mark.slow) for name in FAULTS],
)
def test_an_error_at_the_start_is_told_once_and_all_ranks_leave_with_its_code(folder: Path, name: str) -> None:
    overrides, exit_code, words = FAULTS[name]
    code, said = torchrun(folder, f"run_dir={folder / 'other'}", *overrides(folder))
    assert code == 1, said
    assert exit_codes(said) == [exit_code] * 2, said
    assert len(re.findall(r"^(error|\d+ problems)\b", said, flags=re.MULTILINE)) == 1, said
    assert re.search(words, said), said
    assert "Traceback" not in ours(said), said


@pytest.mark.slow
def test_a_run_folder_that_somebody_trains_in(folder: Path) -> None:
    with run_lock(folder / "held", "train", print):
        code, said = torchrun(folder, f"run_dir={folder / 'held'}")
    assert code == 1
    assert exit_codes(said) == [12, 12], said
    assert re.search(rf"error on rank 0 \(\S+\)\n  .*`train` \(process {os.getpid()} on", said), said
    assert "Traceback" not in ours(said)


@pytest.mark.slow
def test_what_one_rank_meets_while_training_it_says_itself(folder: Path) -> None:
    """Rank 0 encodes from a store that loses its pixels; the other rank is left with a broken connection, in a line."""
    write_tiny_store(folder / "lost" / "store1")
    store = write_tiny_store(folder / "lost" / "store0")
    for file in sorted((store / "images" / "pixels" / "c").rglob("*")):
        if file.is_file():
            file.write_bytes(b"damaged")
    code, said = torchrun(folder, f"run_dir={folder / 'lost-run'}", f"data.store={folder}/lost/store{RANK}")
    assert code == 1
    assert re.search(r"error on rank 0 \(\S+\)\n  step 1, sample 'tiny-\d+'", said), said
    assert 4 in exit_codes(said), said
    assert "Traceback" not in ours(said), said
