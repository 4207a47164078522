"""Every node of a cluster is asked before work begins; progress and report say what happened where."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import megatron_deepstack
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import ClusterError
from orchestration.preprocess.driver import nodes, progress
from orchestration.preprocess.driver.progress import JobProgress
from orchestration.preprocess.part.work import PartDone


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (nodes, "read_token", lambda root: "of another folder", "does not see the store {store}"),
        (nodes, "_find_image", lambda job, parts: Location("/here/only.jpg"), "/here/only.jpg is not there"),
        (megatron_deepstack, "__version__", "9.9", "of megatron-deepstack, the driver 9.9"),
    ],
    ids=["store", "images", "version"],
)
def test_a_node_that_cannot_do_the_job_is_named(
    corpus: Any, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, value: Any, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ClusterError) as caught:
        corpus.preprocess(tmp_path / "store", workers=2)
    said = str(caught.value)
    assert said.startswith("1 of 1 nodes of the cluster cannot do this job:\n  127.0.0.1: ")
    assert message.format(store=tmp_path / "store") in said
    assert "give paths that every node sees: a shared folder, or a URL" in said
    assert not list((tmp_path / "store").glob("parts/*"))


def test_the_report_says_what_was_done_where(corpus: Any, local_ray: None, tmp_path: Path) -> None:
    summary = corpus.preprocess(tmp_path / "store", workers=2)
    report = json.loads((tmp_path / "store" / "report.json").read_text())
    assert report["nodes"] == summary.nodes == {"127.0.0.1": 5}
    assert (report["workers"], report["parts"], report["parts_done_before"], report["parts_done_again"]) == (2, 5, 0, 0)
    shards = sum(path.stat().st_size for path in (tmp_path / "store").glob("images/pixels/c/*/0/0/0"))
    assert report["written_bytes"] > shards


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_few_seconds_without_a_terminal(clock: list[float]) -> None:
    written = io.StringIO()
    shown = JobProgress(400, 1000, Console(file=written, width=40))
    for second in range(1, 13):
        clock[0] = 100.0 + second
        shown.add(PartDone("images", images=10, written_bytes=5_000_000), "node")
        shown.show()
    assert written.getvalue().splitlines() == [
        "preprocess: 60/400 images, 0/1000 records, 10 images/s, 5.00 MB/s, ETA 0:00:34",
        "preprocess: 120/400 images, 0/1000 records, 10 images/s, 5.00 MB/s, ETA 0:00:28",
    ]


def test_the_speed_is_that_of_the_last_half_minute(clock: list[float]) -> None:
    shown = JobProgress(10_000, 0, Console(file=io.StringIO()))
    for _ in range(100):
        clock[0] += 1
        shown.add(PartDone("images", images=50), "node")
    for _ in range(40):
        clock[0] += 1
        shown.add(PartDone("images", images=5, quarantined=(("a", "b"),)), "node")
    assert shown.state().endswith("5 images/s, 0 B/s, ETA 0:16:00, 40 quarantined")


def test_what_was_done_before_does_not_count_as_speed(clock: list[float]) -> None:
    shown = JobProgress(100, 10, Console(file=io.StringIO()))
    shown.add_earlier(PartDone("images", images=90))
    clock[0] += 10
    assert shown.state() == "90/100 images, 0/10 records, 0 images/s, 0 B/s, ETA unknown"
    shown.add(PartDone("images", images=10), "node")
    shown.add(PartDone("text", records=5), "node")
    assert shown.state() == "100/100 images, 5/10 records, 1 images/s, 0 B/s, ETA 0:00:10"


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (140, "5000/10000 images, 0/9000 records, 50 images/s, 50.0 MB/s, ETA 0:01:40, 1 quarantined"),
        (80, "5000/10000 images, 50 images/s, ETA 0:01:40, 1 quarantined"),
        (62, "5000/10000 images, ETA 0:01:40, 1 quarantined"),
        (30, "5000/10000 images"),
    ],
)
def test_a_bar_says_what_the_terminal_has_room_for(clock: list[float], width: int, words: str) -> None:
    written = io.StringIO()
    with JobProgress(10_000, 9_000, Console(file=written, width=width, force_terminal=True)) as shown:
        for second in range(100):
            clock[0] = 101.0 + second
            shown.add(PartDone("images", images=50, written_bytes=50_000_000), "node")
        shown.add(PartDone("images", quarantined=(("a", "b"),)), "node")
        shown.show()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("preprocess ")
    assert last.rstrip().endswith(words)
    assert "…" not in last
