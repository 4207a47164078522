"""Launching, the parts that need no cluster: who sits where, what is wrong where, who is to blame, what shells see."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import CheckpointConfig, LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    HangError,
    LayoutError,
    PreemptedError,
    RankError,
    RunFolderError,
)
from megatron_deepstack.planning.footprint import checkpoint_bytes, part_parameters, rank_bytes
from megatron_deepstack.platform.network import interface_of
from megatron_deepstack.platform.process import process_start
from megatron_deepstack.platform.run_lock import run_lock
from megatron_deepstack.platform.write_whole import partial_of
from megatron_deepstack.testing.tiny import tiny_recipe
from orchestration.launch.before import probe
from orchestration.launch.before.checks import Finding, Link, failures, in_words, judge
from orchestration.launch.before.placement import Demand, Node, check_groups_fit, neighbours, place
from orchestration.launch.before.preflight import require_sound
from orchestration.launch.before.probe import Answer, NodeFacts
from orchestration.launch.before.report import status_text
from orchestration.launch.before.waiting import wait_for_seats
from orchestration.launch.driver import control, run
from orchestration.launch.driver.follow import Follower
from orchestration.launch.driver.record import (
    STOP_FILE,
    Events,
    LaunchRecord,
    Restart,
    State,
    Tail,
    last_lines,
    newest_step,
    read_record,
    write_record,
)
from orchestration.launch.driver.run import launch, rank_environment
from orchestration.launch.driver.stopping import request_stop, wants_it_now
from orchestration.launch.gang.policy import Diagnosis, End, Failure, diagnose, end_of_exception, is_worth_a_retry
from orchestration.launch.gang.rank import RankFailed


def node(number: int, gpus: int = 8, cpus: int = 64) -> Node:
    return Node(f"id{number}", f"10.0.0.{number}", f"host{number}", gpus, cpus)


def demand(num_ranks: int, *, cpus: int = 1, gpus: bool = True, **axes: int) -> Demand:
    return Demand(num_ranks, ParallelConfig(**axes), cpus, gpus)


def held(seats: tuple, number: int) -> list[int]:
    return [seat.rank for seat in seats if seat.node.address == f"10.0.0.{number}"]


class TestPlacement:
    def test_ranks_are_ordered_by_address_as_a_number(self) -> None:
        seats = place(demand(24, tensor=8, pipeline=3), [node(10), node(9), node(1)])
        assert (held(seats, 1), held(seats, 9), held(seats, 10)) == (
            list(range(8)), list(range(8, 16)), list(range(16, 24)),
        )  # fmt: skip
        assert [seat.place.pp for seat in seats] == [rank // 8 for rank in range(24)], "one stage a node"

    def test_a_group_is_never_split(self) -> None:
        """The first node has four GPUs free: Ray's packing would begin there and break both groups of eight."""
        seats = place(demand(16, tensor=8), [node(1, gpus=4), node(2), node(3)])
        assert (held(seats, 1), len(held(seats, 2)), len(held(seats, 3))) == ([], 8, 8)
        for group in range(2):
            assert len({seat.node.id for seat in seats[8 * group : 8 * group + 8]}) == 1

    def test_as_few_nodes_as_possible(self) -> None:
        assert len({seat.node.id for seat in place(demand(8, tensor=2), [node(1), node(2)])}) == 1

    def test_cpus_limit_slots(self) -> None:
        assert demand(1, cpus=16, tensor=2).slots(node(1, gpus=8, cpus=63)) == 2
        assert demand(1, gpus=False).slots(node(1, gpus=0, cpus=3)) == 3

    def test_no_node_is_large_enough(self) -> None:
        with pytest.raises(LayoutError, match=r"a group of 8 ranks stays inside one node, and none has 8 x 1 GPU"):
            check_groups_fit(demand(8, tensor=8), [node(1, gpus=4), node(2, gpus=4)])

    def test_a_head_without_slots_says_nothing_of_nodes_that_join_later(self) -> None:
        check_groups_fit(demand(8, tensor=8), [node(1, gpus=0, cpus=0)])

    def test_what_is_missing_is_named(self) -> None:
        with pytest.raises(ClusterError) as caught:
            place(demand(16, tensor=4), [node(1), node(2, gpus=6)])
        assert "16 ranks need 16 x 1 GPU and 1 CPU in groups of 4 on one node; 4 are missing" in str(caught.value)
        assert "10.0.0.2 has 6 GPUs and 64 CPUs" in str(caught.value)

    def test_an_empty_cluster(self) -> None:
        with pytest.raises(ClusterError, match="the cluster has no nodes"):
            place(demand(1), [])

    def test_neighbours_are_a_ring(self) -> None:
        seats = place(demand(24, tensor=8, pipeline=3), [node(1), node(2), node(3)])
        assert [(a.address[-1], b.address[-1]) for a, b in neighbours(seats)] == [("1", "2"), ("2", "3"), ("3", "1")]
        assert len(neighbours(place(demand(16, tensor=8), [node(1), node(2)]))) == 1
        assert neighbours(place(demand(8, tensor=8), [node(1)])) == []


def failure(rank: int, end: End, text: str = "x", error: Exception | None = None) -> Failure:
    return Failure(rank, f"pid {rank} on host", end, text, error)  # type: ignore[arg-type]


class TestPolicy:
    @pytest.mark.parametrize(
        ("ends", "blamed"),
        [
            ({0: End.CUT_OFF, 1: End.DIED, 2: End.CUT_OFF}, [1]),
            ({0: End.DIED, 1: End.NODE_DIED, 2: End.NODE_DIED}, [1, 2]),
            ({0: End.RAISED, 3: End.REFUSED}, [3]),
            ({0: End.CUT_OFF, 1: End.RAISED}, [1]),
            ({0: End.CUT_OFF, 1: End.SILENT}, [1]),
            ({0: End.CUT_OFF, 1: End.CUT_OFF}, [0, 1]),
        ],
    )
    def test_the_likeliest_cause_is_blamed(self, ends: dict[int, End], blamed: list[int]) -> None:
        found = diagnose([failure(rank, end) for rank, end in ends.items()])
        assert [one.rank for one in found.causes] == blamed
        assert sorted([*blamed, *found.followers]) == sorted(ends)

    def test_the_text_names_ranks_once(self) -> None:
        found = diagnose([failure(1, End.DIED, "killed"), failure(0, End.CUT_OFF), failure(2, End.CUT_OFF)])
        assert found.text == "rank 1 (pid 1 on host) died: killed; ranks 0, 2 failed with it"
        assert isinstance(found.error, RankError)

    def test_many_ranks_are_not_all_listed(self) -> None:
        assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (" in diagnose([failure(n, End.NODE_DIED) for n in range(64)]).text

    @pytest.mark.parametrize(
        ("kind", "text", "end"),
        [
            ("RuntimeError", "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.2]:1", End.CUT_OFF),
            ("DistBackendError", "NCCL error in: ... remote process exited or there was a network error", End.CUT_OFF),
            ("RuntimeError", "shape '[2]' is invalid for input of size 3", End.RAISED),
            ("AssertionError", "rows of gloo", End.RAISED),
        ],
    )
    def test_broken_connections_are_told_from_own_exceptions(self, kind: str, text: str, end: End) -> None:
        assert end_of_exception(kind, text) is end

    @pytest.mark.parametrize(
        ("now", "before", "again"),
        [
            (failure(0, End.DIED), None, True),
            (failure(0, End.DIED), failure(0, End.DIED), True),
            (failure(0, End.NODE_DIED), None, True),
            (failure(0, End.HUNG), None, True),
            (failure(0, End.REFUSED, error=ConfigError(["wrong"])), None, False),
            (failure(0, End.REFUSED, error=CheckpointError("other model")), None, False),
            (failure(0, End.REFUSED, error=PreemptedError("asked")), None, False),
            (failure(0, End.REFUSED, error=HangError("silent")), None, True),
            (failure(0, End.RAISED, "ValueError: a"), None, True),
            (failure(0, End.RAISED, "ValueError: a"), failure(1, End.RAISED, "ValueError: b"), True),
            (failure(0, End.RAISED, "ValueError: a"), failure(1, End.RAISED, "ValueError: a"), False),
        ],
    )
    def test_mistakes_are_not_tried_again(self, now: Failure, before: Failure | None, again: bool) -> None:
        previous = None if before is None else Diagnosis((before,), ())
        assert is_worth_a_retry(Diagnosis((now,), ()), previous) is again

    def test_an_error_survives_the_way_from_the_rank(self) -> None:
        sent = RankFailed("pid 1 on host", "ConfigError", "a\nb", LayoutError(["a", "b"]))
        got = pickle.loads(pickle.dumps(sent))
        assert isinstance(got.error, LayoutError)
        assert (got.where, got.kind, got.text, got.error.problems) == (sent.where, "ConfigError", "a\nb", ("a", "b"))
        found = diagnose([Failure(0, got.where, End.REFUSED, got.text, got.error)])
        assert found.error is got.error


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = tiny_recipe(parallel=ParallelConfig(pipeline=2))
    return replace(recipe, run_dir=str(tmp_path / "run"), data=replace(recipe.data, store="/s", tokenizer="/t"))


def facts(number: int, **changes: object) -> NodeFacts:
    settings: dict[str, object] = {
        "address": f"10.0.0.{number}",
        "host": f"host{number}",
        "versions": {"python": "3.11.7", "torch": "2.13"},
        "gpu_memories": (80 << 30,) * 8,
        "interface": "eth0",
        "folder": Answer(value="/home"),
        "run_dir": Answer(value=f"token{number}"),
        "free_bytes": 1 << 40,
        "stores": {"/s": Answer(value="plan")},
        "files": {"/t": Answer(value="9 bytes")},
    }
    return NodeFacts(**{**settings, **changes})  # type: ignore[arg-type]


class TestChecks:
    def judged(
        self,
        recipe: Recipe,
        second: NodeFacts,
        seen: tuple[str, ...] = ("token1", "token2"),
        link: Link | None = None,
    ) -> tuple[Finding, ...]:
        seats = place(demand(2, pipeline=2, cpus=40), [node(1), node(2)])
        everything = {"10.0.0.1": ("token1", "token2"), "10.0.0.2": seen}
        links = [link or Link("10.0.0.1", "10.0.0.2", 0.001)]
        return judge(recipe, seats, [facts(1), second], everything, links, uses_gpus=True)

    def test_all_is_well(self, recipe: Recipe) -> None:
        findings = self.judged(recipe, facts(2))
        assert failures(findings) == ()
        require_sound(findings)
        assert any(one.check == "all-reduce" and "1.0 ms" in one.found for one in findings)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"versions": {"python": "3.11.7", "torch": "2.12"}}, "version of torch: found 2.12, expected 2.13"),
            ({"gpu_memories": ()}, "GPUs: found 0 seen by torch, expected 1"),
            ({"gpu_memories": (1 << 10,)}, "GPU memory: found 0.0 MiB, expected"),
            ({"interface": None}, "network interface: found none, expected one that holds 10.0.0.2"),
            ({"free_bytes": 1 << 10}, "disk: found 0.0 MiB free, expected"),
            ({"stores": {"/s": Answer(fault="no such folder")}}, "store /s: found no such folder, expected a finished"),
            ({"stores": {"/s": Answer(value="other")}}, "store /s: found plan other, expected plan plan"),
            ({"files": {"/t": Answer(fault="[Errno 13]")}}, "/t: found [Errno 13], expected readable here"),
            ({"run_dir": Answer(fault="read-only")}, "run folder: found read-only, expected writable here"),
        ],
    )
    def test_what_is_wrong_where(self, recipe: Recipe, changes: dict[str, object], words: str) -> None:
        findings = self.judged(recipe, facts(2, **changes))
        assert f"10.0.0.2: {words}" in in_words(findings)
        with pytest.raises(ClusterError, match="checks failed, so nothing was started"):
            require_sound(findings)

    def test_a_folder_of_that_name_on_each_node_is_not_one_folder(self, recipe: Recipe) -> None:
        words = in_words(self.judged(recipe, facts(2), seen=("token2",)))
        assert "10.0.0.2: run folder: found the files of 10.0.0.1 are not there, expected one folder" in words

    def test_a_link_without_a_way_through(self, recipe: Recipe) -> None:
        words = in_words(self.judged(recipe, facts(2), link=Link("10.0.0.1", "10.0.0.2", None, "timed out")))
        assert "10.0.0.1 - 10.0.0.2: all-reduce: found timed out, expected a way through" in words

    def test_relative_paths_need_the_drivers_folder(self, recipe: Recipe) -> None:
        gone = facts(2, folder=Answer(fault="no such folder"))
        assert failures(self.judged(recipe, gone)) == ()
        relative = replace(recipe, run_dir="runs/x")
        assert "10.0.0.2: working folder: found no such folder" in in_words(self.judged(relative, gone))

    def test_all_problems_at_once(self, recipe: Recipe) -> None:
        found = self.judged(recipe, facts(2, interface=None, free_bytes=0, files={"/t": Answer(fault="gone")}))
        assert len(failures(found)) == 3

    def test_facts_of_this_machine(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "t").write_text("x")
        here = replace(recipe, data=replace(recipe.data, store=str(tmp_path / "none"), tokenizer=str(tmp_path / "t")))
        found = probe.gather(probe.Questions(here, str(Path.cwd())), "127.0.0.1", "me")
        assert found.interface == "lo"
        assert found.files[str(tmp_path / "t")] == Answer(value="1 bytes")
        assert "none" in found.stores[str(tmp_path / "none")].fault
        assert found.run_dir == Answer(value="me")
        assert probe.tokens_seen(probe.Questions(here, ".")) == ("me",)
        probe.forget_tokens(Path(here.run_dir))
        assert probe.tokens_seen(probe.Questions(here, ".")) == ()
        assert found.free_bytes > 0

    def test_interfaces(self) -> None:
        assert interface_of("127.0.0.3") == "lo"
        assert interface_of("203.0.113.7") is None


class TestFootprint:
    def test_published_sizes(self) -> None:
        """Vicuna-7B has 6.74e9 parameters, CLIP ViT-L/14-336 0.304e9."""
        counted = part_parameters(Recipe().model)
        assert counted[Part.LANGUAGE] == pytest.approx(6.738e9, rel=1e-3)
        assert counted[Part.VISION] == pytest.approx(0.3035e9, rel=0.01)

    def test_a_checkpoint_in_bf16_takes_14_bytes_a_learned_parameter(self) -> None:
        recipe = Recipe()
        counted = part_parameters(recipe.model)
        learned = counted[Part.LANGUAGE] + counted[Part.PROJECTOR]
        assert checkpoint_bytes(recipe) == 2 * counted[Part.VISION] + 14 * learned

    def test_what_a_rank_holds_shrinks_with_the_layout(self) -> None:
        def of(num_ranks: int, **parallel: object) -> int:
            return rank_bytes(replace(Recipe(), parallel=ParallelConfig(**parallel)), num_ranks)  # type: ignore[arg-type]

        one = of(1)
        assert one == pytest.approx(18 * 6.76e9 + 2 * 0.304e9, rel=0.01)
        assert of(8, tensor=8) < one / 6
        assert of(4, pipeline=4) < one / 3
        assert of(64, tensor=8, distributed_optimizer=True) < of(64, tensor=8)
        lora = replace(Recipe(), lora=LoraConfig(rank=16))
        assert rank_bytes(lora, 1) < one / 5
        fp32 = replace(Recipe(), train=replace(Recipe().train, precision=Precision.FP32))
        assert rank_bytes(fp32, 1) < one


class TestRecord:
    def test_it_comes_back_as_it_was(self, tmp_path: Path) -> None:
        record = LaunchRecord(cluster="10.0.0.1:6379", num_ranks=2, max_failures=3)
        record.restarts.append(Restart(1.5, "rank 1 died", (1,)))
        record.state = State.RUNNING
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
        assert LaunchRecord(state=State.RUNNING, pid=gone.pid).lost
        assert not LaunchRecord(state=State.RUNNING).lost
        assert not LaunchRecord(state=State.FAILED, pid=gone.pid).lost
        elsewhere = LaunchRecord(state=State.RUNNING, host="elsewhere", machine="elsewhere", pid=1)
        assert not elsewhere.lost
        elsewhere.heartbeat -= 3600
        assert elsewhere.lost

    def test_another_process_with_the_drivers_number_is_not_the_driver(self) -> None:
        """A restarted machine or container gives the same name and the same low numbers again."""
        assert LaunchRecord(state=State.RUNNING, pid_since=process_start() - 3600).lost
        before_a_restart = LaunchRecord(state=State.RUNNING, machine="an earlier start of it", heartbeat=0.0)
        assert before_a_restart.host == socket.gethostname()
        assert before_a_restart.lost

    def test_a_record_of_an_earlier_version_is_judged_by_its_heartbeat(self, tmp_path: Path) -> None:
        write_record(tmp_path, LaunchRecord(state=State.RUNNING))
        raw = json.loads((tmp_path / "launch.json").read_text())
        for beat, lost in ((raw["heartbeat"], False), (raw["heartbeat"] - 3600, True)):
            earlier = {name: value for name, value in raw.items() if name not in ("machine", "pid_since")}
            (tmp_path / "launch.json").write_text(json.dumps({**earlier, "pid": 2**22 + 1, "heartbeat": beat}))
            found = read_record(tmp_path)
            assert found is not None
            assert found.lost is lost

    def test_a_second_driver_is_refused_beside_any_kind_of_first(self, tmp_path: Path) -> None:
        """Before Ray or anything else of the launch has begun: the record of the run that goes on stays as it is."""
        for what in ("train", "torchrun", "launch"):
            with run_lock(tmp_path, what, print):
                words = rf"`{what}` \(process {os.getpid()} on .* trains in this run folder already"
                with pytest.raises(RunFolderError, match=words):
                    launch(replace(Recipe(), run_dir=str(tmp_path)))
            assert read_record(tmp_path) is None

    def test_a_run_folder_that_cannot_be_written_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(RunFolderError, match=r"run_dir: .*run cannot be written"):
            launch(replace(Recipe(), run_dir=str(tmp_path / "run")))

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
        assert record.state is State.RUNNING
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


class TestWaiting:
    def wait(
        self, look: Callable[[], str], seconds: float = 60.0, since: float | None = None, asked: bool = False
    ) -> tuple[str, list[str]]:
        told: list[str] = []
        since = time.monotonic() if since is None else since
        found = wait_for_seats(look, since=since, seconds=seconds, tell=told.append, asked_to_stop=lambda: asked)
        return found, told

    def test_nodes_that_come_late(self) -> None:
        """What is missing is told once for each thing, and not within the first moments."""
        missing = iter(["two", "two", "one"])

        def look() -> str:
            for what in missing:
                raise ClusterError(what)
            return "seats"

        assert self.wait(look, since=time.monotonic() - 30) == ("seats", ["two", "one"])

    def missing(self) -> str:
        raise ClusterError("2 are missing")

    def test_nodes_that_never_come(self) -> None:
        with pytest.raises(ClusterError, match=r"after 3 s \(launch.start_seconds\): 2 are missing. Bring the nodes"):
            self.wait(self.missing, seconds=3, since=time.monotonic() - 4)

    def test_a_stop_ends_the_wait(self) -> None:
        with pytest.raises(PreemptedError, match="while waiting for nodes"):
            self.wait(self.missing, asked=True)

    def test_a_layout_that_never_fits_is_told_at_once(self) -> None:
        def look() -> str:
            raise LayoutError(["parallel.tensor: too large"])

        with pytest.raises(LayoutError):
            self.wait(look)


@pytest.fixture
def running(recipe: Recipe) -> Path:
    """A run in its 10th step of 40, whose driver is this process."""
    run_dir = Path(recipe.run_dir)
    (run_dir / "checkpoints" / "step_00000006").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000009.partial").mkdir()
    long = replace(recipe, train=replace(recipe.train, steps=40))
    (run_dir / "recipe.yaml").write_text(recipe_to_yaml(long))
    lines = [{"step": n, "loss": 1 / n, "tokens_per_second": 100 * n, "step_seconds": 2.0} for n in range(1, 11)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 11, "lo')
    record = LaunchRecord(state=State.RUNNING, num_ranks=2, max_failures=3)
    record.restarts.append(Restart(time.time(), "rank 1 (pid 5 on host) died: killed", (1,)))
    write_record(run_dir, record)
    return run_dir


def changed(run_dir: Path, **changes: object) -> None:
    record = read_record(run_dir)
    assert record is not None
    for name, value in changes.items():
        setattr(record, name, value)
    write_record(run_dir, record)


class TestControl:
    def test_status_of_a_running_run(self, running: Path) -> None:
        found = control.status_of(running)
        assert (found.state, found.num_steps, found.checkpoint, found.exit_code) == ("running", 40, 6, 0)
        assert found.seconds_left == 60.0
        text = status_text(found)
        assert "step       10 of 40, loss 0.1000, 1,000 tokens/s, 1 min 0 s left" in text
        assert "checkpoint after step 6" in text
        assert "restarts   1 of at most 3" in text
        assert "rank 1 (pid 5 on host) died: killed" in text
        assert newest_step(running) == 6

    @pytest.mark.parametrize(
        ("changes", "code", "words"),
        [
            ({"state": State.FINISHED, "exit_code": 0, "outcome": "finished"}, 0, "finished"),
            ({"state": State.STOPPED, "exit_code": 75, "outcome": "asked to stop"}, 75, "because    asked to stop"),
            ({"state": State.FAILED, "exit_code": 7, "outcome": "rank 0 died"}, 7, "because    rank 0 died"),
            ({"host": "elsewhere", "machine": "elsewhere"}, 0, "running"),
        ],
    )
    def test_status_leaves_with_the_runs_own_code(
        self, running: Path, changes: dict[str, object], code: int, words: str
    ) -> None:
        changed(running, **changes)
        result = CliRunner().invoke(app, ["status", str(running)], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        assert words in result.output

    def test_status_of_a_run_whose_driver_is_gone(self, running: Path) -> None:
        changed(running, pid=2**22 + 1)
        result = CliRunner().invoke(app, ["status", str(running)])
        assert (result.exit_code, "lost" in result.output) == (1, True)

    def test_status_of_a_run_of_another_launcher(self, running: Path) -> None:
        (running / "launch.json").unlink()
        result = CliRunner().invoke(app, ["status", str(running)])
        assert (result.exit_code, "trained by another launcher" in result.output) == (0, True)
        with pytest.raises(ConfigError, match="not started by `launch`; send SIGTERM"):
            control.stop(running, now=False, wait_seconds=0)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run is there"):
            control.status_of(tmp_path)

    def test_stop_leaves_a_request_and_says_when_it_is_not_met(self, running: Path) -> None:
        with pytest.raises(ClusterError, match=r"still running after 0 s; wait on, or `stop .* --now`"):
            control.stop(running, now=False, wait_seconds=0)
        assert json.loads((running / STOP_FILE).read_text())["how"] == "save"
        assert not wants_it_now(running)
        request_stop(running, "test", how="now")
        assert wants_it_now(running)

    def test_stop_of_a_run_that_is_over(self, running: Path) -> None:
        changed(running, state=State.FINISHED, outcome="finished")
        assert control.stop(running, now=False, wait_seconds=9) == "nothing to stop: finished, finished"
        changed(running, state=State.RUNNING, pid=2**22 + 1)
        assert "its driver (pid 4194305" in control.stop(running, now=True, wait_seconds=9)
        assert not (running / STOP_FILE).exists()

    def test_stop_now_kills_a_driver_that_does_not_answer(self, running: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as driver:
            changed(running, pid=driver.pid, pid_since=process_start(driver.pid))
            said = control.stop(running, now=True, wait_seconds=0.1)
            assert driver.wait(60) == -9
        assert f"its driver (pid {driver.pid} on {socket.gethostname()}) had not ended after 0 s and was killed" in said

    def test_stop_now_spares_a_stranger_with_the_drivers_number(self, running: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            changed(running, pid=stranger.pid, pid_since=process_start(stranger.pid) - 3600)
            assert control.status_of(running).state == "lost"
            said = control.stop(running, now=True, wait_seconds=0.1)
            assert f"its driver (pid {stranger.pid} on {socket.gethostname()}) is gone" in said
            assert stranger.poll() is None
            stranger.communicate(b"\n")
        assert stranger.returncode == 0

    def test_stop_now_of_a_driver_of_another_container_of_that_name(self, running: Path) -> None:
        changed(running, machine="another")
        with pytest.raises(ClusterError, match=rf"has not ended after 0 s; `kill -9 {os.getpid()}` there"):
            control.stop(running, now=True, wait_seconds=0)

    def test_stop_now_of_a_driver_that_ends_at_that_moment(
        self, running: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed = []

        def kill(pid: int, number: int) -> None:
            killed.append((pid, number))
            raise ProcessLookupError

        monkeypatch.setattr(control.os, "kill", kill)
        assert control.stop(running, now=True, wait_seconds=0).endswith("is gone")
        assert killed == [(os.getpid(), signal.SIGKILL)]


def test_variables_that_ranks_get() -> None:
    given = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "OMP_NUM_THREADS": "4", "RANK": "3"}
    assert rank_environment(given) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_lines_of_rank_0_are_passed_on_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "saved [/runs]/1:100:3 [bold]now[/bold]"
    Follower(tmp_path, LaunchRecord()).say(line)
    assert capsys.readouterr().out == f"{line}\n"


def test_dry_run_without_a_cluster(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is shown as it is and nothing is started; what is wrong is the exit code's matter too."""
    monkeypatch.setattr(socket, "gethostname", lambda: "[b]1:100:3")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(replace(recipe, checkpoint=CheckpointConfig(keep=1))))
    result = CliRunner().invoke(app, ["launch", str(file), "--dry-run"], env={"COLUMNS": "160"})
    assert result.exit_code == ClusterError.exit_code
    for words in (
        "2 ranks",
        "WRONG",
        "store /s",
        "restarts   3 at most",
        "from the beginning",
        "OMP_NUM_THREADS=1",
        "[b]1:100:3",
    ):
        assert words in result.output
    assert "ray" not in {path.name for path in Path(recipe.run_dir).iterdir()}
