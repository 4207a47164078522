"""What a launched run writes down: its record, its events, its logs; and what a full disk does to that."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import (
    ClusterError,
    ConfigError,
    PreemptedError,
    RunFolderError,
)
from megatron_deepstack.platform.files.run_lock import run_lock
from megatron_deepstack.platform.files.write_whole import partial_of
from megatron_deepstack.platform.processes.process import process_ticks
from orchestration.launch.driver import run
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import (
    STALE_SECONDS,
    Events,
    LaunchRecord,
    Restart,
    RunState,
    Tail,
    is_lost,
    last_lines,
    read_record,
    write_record,
)
from orchestration.launch.driver.stopping import is_asked, request_stop


class TestRecord:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        record = LaunchRecord(cluster="10.0.0.1:6379", num_ranks=2, max_failures=3)
        record.restarts.append(Restart(1.5, "rank 1 died", (1,)))
        record.state = RunState.RUNNING
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
        assert [path.name for path in tmp_path.iterdir()] == ["launch.json"]

    def test_none_and_damaged(self, tmp_path: Path) -> None:
        assert read_record(tmp_path) is None
        (tmp_path / "launch.json").write_text("{}")
        with pytest.raises(ConfigError, match="not a record of `launch`"):
            read_record(tmp_path)

    def test_a_driver_that_is_gone_is_lost(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait()
        assert is_lost(tmp_path, LaunchRecord(state=RunState.RUNNING, pid=gone.pid))
        assert not is_lost(tmp_path, LaunchRecord(state=RunState.RUNNING))
        assert not is_lost(tmp_path, LaunchRecord(state=RunState.FAILED, pid=gone.pid))

    @pytest.mark.parametrize("seconds", [-3600.0, 0.0, 3600.0])
    def test_a_driver_elsewhere_is_lost_once_it_writes_no_more_whatever_the_clock_says_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
    ) -> None:
        elsewhere = LaunchRecord(state=RunState.RUNNING, host="elsewhere", machine="elsewhere", pid=1)
        write_record(tmp_path, elsewhere)
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + seconds)
        assert not is_lost(tmp_path, elsewhere)
        written = (tmp_path / "launch.json").stat().st_mtime - STALE_SECONDS - 1
        os.utime(tmp_path / "launch.json", (written, written))
        assert is_lost(tmp_path, elsewhere)

    def test_another_process_with_the_drivers_number_is_not_the_driver(self, tmp_path: Path) -> None:
        """A restarted machine or container gives the same name and the same low numbers again."""
        assert is_lost(tmp_path, LaunchRecord(state=RunState.RUNNING, pid_ticks=process_ticks() - 3600))
        before_a_restart = LaunchRecord(state=RunState.RUNNING, machine="an earlier start of it")
        assert before_a_restart.host == socket.gethostname()
        write_record(tmp_path, before_a_restart)
        os.utime(tmp_path / "launch.json", (1, 1))
        assert is_lost(tmp_path, before_a_restart)

    @pytest.mark.parametrize(("seconds", "lost"), [(0, False), (3600, True)])
    def test_a_record_of_an_earlier_version_is_judged_by_its_age(
        self, tmp_path: Path, seconds: float, lost: bool
    ) -> None:
        write_record(tmp_path, LaunchRecord(state=RunState.RUNNING))
        file = tmp_path / "launch.json"
        raw = json.loads(file.read_text())
        earlier = {name: value for name, value in raw.items() if name not in ("machine", "pid_since", "pid_ticks")}
        file.write_text(json.dumps({**earlier, "pid": 2**22 + 1, "heartbeat": 1.0}))
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - seconds))
        found = read_record(tmp_path)
        assert found is not None
        assert is_lost(tmp_path, found) is lost

    def test_a_second_driver_is_refused_beside_any_kind_of_first(self, tmp_path: Path) -> None:
        """Before Ray or anything else of the launch has begun: the record of the run that goes on stays as it is."""
        for what in ("train", "torchrun", "launch"):
            with run_lock(tmp_path, what, print):
                words = rf"`{what}` \(process {os.getpid()} on .* trains in this run folder already"
                with pytest.raises(RunFolderError, match=words):
                    run.launch(replace(Recipe(), run_dir=str(tmp_path)))
            assert read_record(tmp_path) is None

    def test_a_run_folder_that_cannot_be_written_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(RunFolderError, match=r"run_dir: .*run cannot be written"):
            run.launch(replace(Recipe(), run_dir=str(tmp_path / "run")))

    def test_a_growing_log(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        tail = Tail(path, from_start=True)
        assert tail.lines() == []
        path.write_text("one\ntwo")
        assert tail.lines() == ["one"]
        with path.open("a") as file:
            file.write(" more\nthree\n")
        assert tail.lines() == ["two more", "three"]
        assert Tail(path, from_start=False).lines() == []
        assert last_lines(path, 2) == ["two more", "three"]
        assert last_lines(tmp_path / "none", 2) == []

    def test_a_log_that_cannot_be_read_for_a_moment(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        tail = Tail(path, from_start=True)
        path.mkdir()
        assert tail.lines() == []
        path.rmdir()
        path.write_text("one\n")
        assert tail.lines() == ["one"]

    @pytest.mark.parametrize("length", [10, 1 << 15, 1 << 18])
    def test_the_last_lines_however_long_they_are(self, tmp_path: Path, length: int) -> None:
        """A step that is left out lists all of its samples."""
        path = tmp_path / "log"
        lines = [f"{number}{'x' * length}" for number in range(8)]
        path.write_text("first\n" + "".join(f"{line}\n" for line in lines))
        for number in (1, 3, 8):
            assert last_lines(path, number) == lines[-number:]
        assert last_lines(path, 20) == ["first", *lines]

    def test_an_event_that_a_full_disk_has_cut_off_is_passed_over(self, tmp_path: Path) -> None:
        events, record = Events(tmp_path), LaunchRecord()
        events.clear()
        follower = Follower(tmp_path, record)
        with events.path.open("a") as file:
            file.write('{"event": "ran')
        events._torn = True
        events.add("start")
        events.add("running")
        follower.look()
        assert (record.attempt, record.state) == (1, RunState.RUNNING)

    def test_an_event_that_cannot_be_written_ends_nothing(self, tmp_path: Path) -> None:
        events = Events(tmp_path)
        events.path.mkdir(parents=True)
        events.add("start")
        events.path.rmdir()
        events.add("running")
        assert [json.loads(line)["event"] for line in events.path.read_text().splitlines() if line] == ["running"]

    def test_a_folder_that_does_not_answer_has_asked_for_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request_stop(tmp_path, "test")
        assert is_asked(tmp_path)

        def stale(*_: object, **__: object) -> None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with monkeypatch.context() as away:
            away.setattr("os.stat", stale)
            asked = is_asked(tmp_path)
        assert not asked


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run folder in which this process cannot write its record: a folder is where the unfinished file would be."""
    obstacle = partial_of(tmp_path / "full" / "launch.json")
    obstacle.mkdir(parents=True)
    return obstacle


class TestFullDisk:
    def test_a_heartbeat_that_cannot_be_written_is_left_out(self, full: Path) -> None:
        run_dir, record = full.parent, LaunchRecord()
        with pytest.raises(OSError, match="directory"):
            write_record(run_dir, record)
        Events(run_dir).clear()
        follower = Follower(run_dir, record)
        Events(run_dir).add("running")
        follower.look()
        assert record.state is RunState.RUNNING
        assert read_record(run_dir) is None
        full.rmdir()
        Events(run_dir).add("start")
        follower.look()
        assert read_record(run_dir) == record

    @pytest.mark.parametrize(
        "ends", [ClusterError("no nodes"), PreemptedError("asked to stop")], ids=["fails", "stops"]
    )
    def test_the_run_keeps_its_own_end(
        self, recipe: Recipe, ends: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_dir = Path(recipe.run_dir)

        def fill_up(*_: object) -> None:
            partial_of(run_dir / "launch.json").mkdir()
            raise ends

        monkeypatch.setattr(run, "_cluster", fill_up)
        with pytest.raises(type(ends)) as caught:
            run.launch(recipe)
        assert caught.value is ends
        said = capsys.readouterr().err
        assert f"launch: {run_dir}/launch.json could not be written: Is a directory. The run is" in said
        assert f"({ends}), but `status` will call it lost; make room or fix the folder" in said
