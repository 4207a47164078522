"""Numbers have units that fit their size; progress says how far and how long."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from megatron_deepstack.platform import progress
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.platform.quantity import brief_time, clock, data_size, duration, flop_rate, flop_scale

RATES = {0.0: "0 FLOP/s", 6.37e-3: "6.37 GFLOP/s", 2e-6: "2 MFLOP/s", 412.3: "412 TFLOP/s", 1978.0: "1.98 PFLOP/s"}
SIZES = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 kB", 13_476_839_424: "13.5 GB", 2_500_000_000_000: "2.5 TB"}


@pytest.mark.parametrize(("tflops", "words"), RATES.items())
def test_rates(tflops: float, words: str) -> None:
    assert " ".join(flop_rate(tflops)) == words


def test_a_scale_takes_values_to_their_unit() -> None:
    assert flop_scale("GFLOP/s") * 6.4e-3 == pytest.approx(6.4)


@pytest.mark.parametrize(("num_bytes", "words"), SIZES.items())
def test_sizes(num_bytes: float, words: str) -> None:
    assert data_size(num_bytes) == words


def test_times() -> None:
    assert [clock(seconds) for seconds in (0, 65, 3661, -1)] == ["0:00", "1:05", "1:01:01", "0:00"]


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_in_a_pipe_a_plain_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking, out = Clock(monkeypatch), io.StringIO()
    with WorkProgress("generate", 200, "questions", console=Console(file=out)) as work:
        for done in range(1, 41):
            ticking.now += 0.5
            work.at(done)
    assert out.getvalue().splitlines() == [
        "generate: 10 of 200 questions, 1:35 left",
        "generate: 20 of 200 questions, 1:30 left",
        "generate: 30 of 200 questions, 1:25 left",
        "generate: 40 of 200 questions, 1:20 left",
    ]


def test_bytes_are_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = Clock(monkeypatch)
    work = WorkProgress("export", 10e9, "bytes", console=Console(file=io.StringIO()))
    ticking.now = 4.0
    assert work.state(5e9) == "5 GB of 10 GB, 0:04 left"


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (80, "45,678 of 123,456 questions, 1:53:30 left"),
        (60, "45,678 of 123,456 questions, 1:53:30 left"),
        (40, "37%, 1:53:30 left"),
        (20, "37%"),
    ],
)
def test_a_bar_says_what_the_terminal_has_room_for(monkeypatch: pytest.MonkeyPatch, width: int, words: str) -> None:
    ticking, out = Clock(monkeypatch), io.StringIO()
    with WorkProgress(
        "generate", 123456, "questions", console=Console(file=out, width=width, force_terminal=True)
    ) as w:
        ticking.now = 4000.0
        w.at(45678)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("generate ")
    assert last.rstrip().endswith(words)
    assert "…" not in last


def test_ranks_that_are_quiet_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkProgress("generate", 2, "questions", quiet=True) as work:
        work.at(1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.00215, "2.15 ms"), (1.5e-5, "15 us"), (2.5, "2.5 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_time_of_nothing() -> None:
    assert brief_time(0.0) == "0 s"
