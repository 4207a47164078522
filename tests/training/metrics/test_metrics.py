"""Where a run's records go: JSON lines, TensorBoard, console, Weights & Biases."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_deepstack.config.schema import LoggingConfig, Recipe, TrainConfig
from megatron_deepstack.errors import ConfigError, RunFolderError
from megatron_deepstack.training.metrics import wandb_run
from megatron_deepstack.training.metrics.console import StepConsole
from megatron_deepstack.training.metrics.record import StepRecord
from megatron_deepstack.training.metrics.wandb_run import WandbRun, require_wandb
from megatron_deepstack.training.metrics.writers import Board, JsonLines, MetricsLog


def record(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "loss": 4.0 / step,
        "gradient_norm": 1.5,
        "lr": 1e-3,
        "num_targets": 10,
        "num_tokens": 1000,
        "num_images": 3,
        "step_seconds": 0.5,
        "tokens_per_second": 2000.0,
        "images_per_second": 6.0,
        "memory_bytes": 3 << 30,
        "seconds": {"data": 0.1, "schedule": 0.3},
        "lr_by_part": {"language": 1e-3, "projector": 2e-3},
        "tflops_per_second_per_rank": 412.0,
    }
    return StepRecord(**{**values, **changes})  # type: ignore[arg-type]


def recipe_in(folder: Path, **logging: object) -> Recipe:
    return Recipe(
        name="a run",
        run_dir=str(folder),
        train=TrainConfig(steps=5),
        logging=LoggingConfig(**logging),  # type: ignore[arg-type]
    )


def write(recipe: Recipe, first: int, steps: range) -> None:
    with MetricsLog(recipe, first_step=first, writes=True) as log:
        for step in steps:
            log.add(record(step, resumed=first > 0 and step == first + 1))


def test_json_lines_of_a_resumed_run_hold_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(recipe_in(tmp_path), 0, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a kill
    write(recipe_in(tmp_path), 2, range(3, 6))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["resumed"] for line in lines] == [False, False, True, False, False]
    assert lines[0]["lr_by_part"] == {"language": 1e-3, "projector": 2e-3}
    assert capsys.readouterr().out.count("step ") == 4 + 3


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    write(recipe_in(tmp_path), 0, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = set(board.Tags()["scalars"])
    assert {"loss", "gradient_norm", "lr_by_part/projector", "seconds/schedule", "tokens_per_second"} <= names
    assert "mfu" not in names  # not known here
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (1, 4.0),
        (2, 2.0),
        (3, pytest.approx(4 / 3)),
    ]


@pytest.mark.parametrize("first", [0, 2])
def test_tensorboard_shows_each_step_once_after_a_resumption_and_after_a_new_start(tmp_path: Path, first: int) -> None:
    write(recipe_in(tmp_path), 0, range(1, 4))
    write(recipe_in(tmp_path), first, range(first + 1, 5))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    ["3", "null", '["step"]', '{"step": "one"}', "{}", "\udcff"],
    ids=["number", "null", "list", "word", "nothing", "bytes"],
)
def test_a_line_that_is_no_record_is_dropped(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', errors="surrogateescape")
    JsonLines(file, 1).close()
    assert file.read_text() == '{"step": 1}\n'


def test_the_history_outlives_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(recipe_in(tmp_path), 0, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        JsonLines(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_steps_without_a_finite_loss_are_json_to_every_parser(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    because = {"applied": False, "skipped_because": "loss or gradient not finite"}
    with MetricsLog(recipe_in(tmp_path), first_step=0, writes=True) as log:
        log.add(record(1, loss=math.nan, gradient_norm=math.inf, **because))
        log.add(record(2, loss=None, applied=False, skipped_because="no sample could be read"))
    JsonLines(tmp_path / "metrics.jsonl", 2).close()  # written again by a resumption
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    nan, none = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (nan["loss"], nan["gradient_norm"]) == (None, None)
    assert nan["not_finite"] == {"loss": "nan", "gradient_norm": "inf"}
    assert none["loss"] is None
    assert "not_finite" not in none


def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the sinks meets it; what closing meets afterwards does not take the place of the first error."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def closed_when_full(close: Callable[[], None]) -> Callable[[], None]:
        def closing() -> None:
            close()
            full()

        return closing

    for kind in (JsonLines, Board):
        log = MetricsLog(recipe_in(tmp_path), first_step=0, writes=True)
        words = r"cannot be written \(No space left on device\)\. Make room .*goes on from the newest checkpoint"
        (sink,) = [one for one in log.sinks if isinstance(one, kind)]
        monkeypatch.setattr(sink, "add", full)
        monkeypatch.setattr(sink, "close", closed_when_full(sink.close))
        with pytest.raises(RunFolderError, match=words), log:
            log.add(record(1))
    with pytest.raises(RunFolderError), MetricsLog(recipe_in(tmp_path), first_step=0, writes=True) as log:
        monkeypatch.setattr(log.sinks[0], "close", closed_when_full(log.sinks[0].close))


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(recipe_in(tmp_path, wandb_project="p"), first_step=0, writes=False) as log:
        log.add(record(1))
        log.say("words")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def lines_of(terminal: bool, *records: StepRecord, interval: int = 1) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, highlight=False, soft_wrap=True)
    steps = StepConsole(console, first_step=0, num_steps=100, interval=interval)
    for one in records:
        steps.add(one)
    steps.close()
    return out.getvalue().splitlines()


def test_plain_lines_say_what_happened() -> None:
    (line,) = lines_of(False, record(1, mfu=0.417, validation_loss=1.25))
    assert line.startswith("step   1/100  loss 4.0000  lr 1.00e-03  grad 1.50  2,000 tokens/s  412 TFLOP/s a rank")
    assert "MFU 41.7%  data 20%  3.0 GiB  left " in line
    assert line.endswith("  validation loss 1.2500")
    assert "\x1b" not in line


def test_lines_of_a_decoder_with_experts_say_how_even_they_are(tmp_path: Path) -> None:
    experts = record(1, balance_loss=8.25, busiest_expert=0.125)
    (line,) = lines_of(False, experts)
    assert "  balance 8.250  busiest expert 12%  " in line
    assert {"balance_loss", "busiest_expert"} <= {name for name, _ in experts.scalars}
    assert not {"balance_loss", "busiest_expert"} & {name for name, _ in record(1).scalars}


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_lines_fit_a_terminal_and_keep_what_matters(width: int) -> None:
    out = io.StringIO()
    steps = StepConsole(
        Console(file=out, force_terminal=True, width=width, color_system=None), first_step=0, num_steps=100, interval=1
    )
    steps.add(record(1, mfu=0.417, spike=True))
    steps.close()
    printed = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()))
    lines = [line for line in printed if "loss" in line]
    assert [("loss 4.0000" in line, "SPIKE" in line, len(line) <= width) for line in lines] == [(True, True, True)]


@pytest.mark.parametrize(
    ("tflops", "shown"), [(412.0, "412 TFLOP/s"), (0.00637, "6.37 GFLOP/s"), (1.5e-6, "1.5 MFLOP/s"), (0.0, "0 FLOP/s")]
)
def test_speeds_have_a_unit_that_fits(tflops: float, shown: str) -> None:
    (line,) = lines_of(False, record(1, tflops_per_second_per_rank=tflops))
    assert f"  {shown} a rank" in line


def test_what_the_loop_says_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "saved [/runs]/1:100:3 [bold]now[/bold]"
    with MetricsLog(recipe_in(tmp_path), first_step=0, writes=True) as log:
        log.say(line)
    assert capsys.readouterr().out == f"{line}\n"


EVENTS = {
    "spike": ({"spike": True}, "SPIKE"),
    "skipped": (
        {"applied": False, "loss": math.nan, "skipped_because": "loss or gradient not finite"},
        "SKIPPED: loss or gradient not finite",
    ),
    "nothing to learn": (
        {"applied": False, "loss": None, "skipped_because": "no sample could be read"},
        "SKIPPED: no sample could be read",
    ),
    "unreadable": ({"unreadable": 2}, "2 unreadable"),
}


@pytest.mark.parametrize(("changes", "words"), EVENTS.values(), ids=EVENTS)
def test_what_stands_out_is_said(changes: dict[str, object], words: str) -> None:
    lines = lines_of(False, *(record(step) for step in (1, 2)), record(3, **changes), interval=1)
    assert words not in lines[1]
    assert words in lines[2]


def test_the_interval_leaves_steps_out_but_none_that_stands_out() -> None:
    lines = lines_of(False, *(record(step, spike=step == 7) for step in range(1, 21)), interval=10)
    assert [line.split("/")[0] for line in lines] == ["step   1", "step   7", "step  10", "step  20"]


def test_a_terminal_gets_colours_and_a_bar() -> None:
    text = "\n".join(lines_of(True, record(1), record(2, spike=True)))
    assert "\x1b[1;31m  SPIKE" in text
    assert "2/100" in text
    assert "━" in text


def test_every_number_is_a_scalar_once() -> None:
    names = [name for name, _ in record(3, mfu=0.5).scalars]
    assert len(names) == len(set(names))
    assert {"loss", "mfu", "seconds/data", "spike", "step"} <= set(names)
    assert not {"samples", "slow_ranks", "validation_loss"} & set(names)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.usefixtures("offline")
def test_wandb_offline_holds_the_run_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    import wandb

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe = recipe_in(run_dir, wandb_project="a project")
    write(recipe, 0, range(1, 3))
    identity = (run_dir / "wandb_run_id").read_text()
    write(recipe, 2, range(3, 5))
    wandb.teardown()  # its own process writes the files, at the latest when it ends
    assert (run_dir / "wandb_run_id").read_text() == identity
    folders = sorted((run_dir / "wandb").glob(f"offline-run-*-{identity}*"))
    assert len(folders) == 2
    history = [row for folder in folders for row in history_of(next(folder.glob("*.wandb")))]
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert [row["loss"] for row in history] == [4.0, 2.0, 4 / 3, 1.0]
    assert history[0]["seconds/schedule"] == 0.3


def history_of(file: Path) -> list[dict[str, float]]:
    """Rows of an offline run's log."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in chunks_of(file.read_bytes()):
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        if entry.WhichOneof("record_type") == "history":
            items = (
                (item.key or "/".join(item.nested_key), json.loads(item.value_json)) for item in entry.history.item
            )
            rows.append(dict(items))
    return rows


def chunks_of(log: bytes, header: int = 7, block: int = 1 << 15) -> Iterator[bytes]:
    """Records of a log as LevelDB writes it: blocks of fragments, each with crc32, length and kind before it."""
    place, parts = header, b""
    while place + 7 <= len(log):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield parts
            parts = b""


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb(recipe_in(tmp_path))
    wanted = recipe_in(tmp_path, wandb_project="p")
    for use in (require_wandb, WandbRun):
        with pytest.raises(ConfigError, match=r"pip install 'megatron-deepstack\[wandb\]'"):
            use(wanted)


@pytest.mark.usefixtures("offline")
def test_a_service_that_refuses_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="api_key not configured; run `wandb login`"):
        WandbRun(replace(recipe_in(tmp_path, wandb_project="p")))
