"""Heartbeats: one file per node, written by the first of its ranks that lives; nodes, runs and attempts kept apart."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_deepstack.platform.files import scratch
from megatron_deepstack.training.guard import node_board
from megatron_deepstack.training.guard.heartbeat import Heartbeats, read_beats, silent_ranks
from megatron_deepstack.training.guard.node_board import Beat, NodeBoard

Rank = Callable[..., Heartbeats]


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    """Makes a rank of one run on a node, all in this process."""
    made: list[Heartbeats] = []

    def make(rank: int, num_ranks: int = 4, node: str = "a", run_dir: Path = tmp_path / "run") -> Heartbeats:
        memory = tmp_path / f"memory of {node}"
        memory.mkdir(exist_ok=True)
        monkeypatch.setattr(scratch, "MEMORY", memory)
        monkeypatch.setattr(node_board, "machine_start", lambda: node)
        made.append(Heartbeats(run_dir, rank, num_ranks))
        return made[-1]

    yield make
    for one in made:
        one.close()


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "heartbeats").iterdir())


def beat(*ranks: Heartbeats, doing: str = "step 1", times: int = 1) -> None:
    for _ in range(times):
        for one in ranks:
            one.write(doing)


def test_what_a_rank_says(rank: Rank, tmp_path: Path) -> None:
    one = rank(0)
    beat(one, times=2)
    (said,) = read_beats(tmp_path / "run").values()
    assert (said.rank, said.host, said.pid, said.number) == (0, socket.gethostname(), os.getpid(), 2)
    assert (said.doing, said.hanging) == ("step 1", False)
    assert one.read() == {0: said}


def test_one_file_for_each_node(rank: Rank, tmp_path: Path) -> None:
    nodes = [[rank(0), rank(1)], [rank(2, node="b"), rank(3, node="b")]]
    for ranks in nodes:
        beat(*ranks, times=3)
    assert len(files(tmp_path / "run")) == 2
    assert sorted(read_beats(tmp_path / "run")) == [0, 1, 2, 3]
    told = {number: one.number for number, one in nodes[0][0].read().items()}
    assert told == {0: 3, 1: 3, 2: 3, 3: 2}, "this node at first hand, the other as its writer's last beat found it"


def test_only_the_first_rank_of_a_node_writes(rank: Rank, tmp_path: Path) -> None:
    """After its first beats, in which every rank makes itself known."""
    ranks = [rank(number) for number in range(3)]
    beat(*ranks, times=2)
    (file,) = files(tmp_path / "run")
    beat(*ranks)
    assert [one.is_writer for one in ranks] == [True, False, False]
    file.unlink()
    beat(ranks[1], ranks[2])
    assert files(tmp_path / "run") == []
    beat(ranks[0])
    assert {number: one.number for number, one in read_beats(tmp_path / "run").items()} == {0: 4, 1: 4, 2: 4}


def test_a_writer_that_falls_silent_is_followed_by_the_next(rank: Rank, tmp_path: Path) -> None:
    """Ranks of another node see which rank of this one is silent; the writer takes over again once it wakes up."""
    first, second, third, elsewhere = rank(0), rank(1), rank(2), rank(3, node="b")
    beat(first, second, third, elsewhere, times=3)
    beat(second, third, times=node_silence() + 1)
    before = elsewhere.read()
    beat(second, third, elsewhere)
    after = elsewhere.read()
    assert silent_ranks(before, after, 4) == (0,)
    assert [one.is_writer for one in (second, third)] == [True, False]
    beat(first, second)
    assert not second.is_writer
    assert elsewhere.read()[0].number == 4


def node_silence() -> int:
    from megatron_deepstack.training.guard import heartbeat

    return heartbeat._SILENT_BEATS


def test_all_ranks_of_a_node_silent(rank: Rank) -> None:
    here, there = [rank(0), rank(1)], [rank(2, node="b"), rank(3, node="b")]
    beat(*here, *there, times=3)
    before = here[0].read()
    beat(*here, times=8)
    assert silent_ranks(before, here[0].read(), 4) == (2, 3)


def test_the_last_beats_are_written_by_every_rank(rank: Rank, tmp_path: Path) -> None:
    first, second = rank(0, 2), rank(1, 2)
    beat(first, second, times=3)
    first.write("nothing: it has ended", last=True)
    second.write("nothing: RankError ended it", last=True)
    assert [one.doing for one in read_beats(tmp_path / "run").values()] == [
        "nothing: it has ended", "nothing: RankError ended it",
    ]  # fmt: skip


def test_runs_on_one_machine_do_not_meet(rank: Rank, tmp_path: Path) -> None:
    ours, theirs = rank(0), rank(0, run_dir=tmp_path / "other")
    beat(ours, theirs, times=2)
    beat(ours)
    assert ours.read()[0].number == 3
    assert theirs.read()[0].number == 2


@pytest.mark.parametrize("variable", ["MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"])
def test_an_attempt_does_not_see_the_board_of_the_one_before(
    rank: Rank, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its killed ranks may not be gone yet."""
    monkeypatch.setenv(variable, "1")
    before = rank(1)
    before.board.pass_on_call()
    beat(before)
    monkeypatch.setenv(variable, "2")
    after = rank(0)
    beat(after)
    assert not after.board.is_called
    assert list(after.board.beats()) == [0]


def test_a_rank_that_has_moved_is_where_it_was_last(rank: Rank, tmp_path: Path) -> None:
    """The files of an earlier attempt's nodes lie there still."""
    beat(rank(1, node="b"), times=9)
    moved = rank(1)
    beat(moved)
    assert len(files(tmp_path / "run")) == 2
    assert read_beats(tmp_path / "run")[1].since == moved.read()[1].since
    assert read_beats(tmp_path / "run")[1].number == 1


def test_ranks_of_a_larger_attempt_do_not_count(rank: Rank) -> None:
    beat(rank(5, num_ranks=8, node="b"))
    assert rank(0, num_ranks=2).read() == {}


def test_what_is_no_beat_is_left_out(rank: Rank, tmp_path: Path) -> None:
    beat(rank(0))
    folder = tmp_path / "run" / "heartbeats"
    (folder / "torn.json").write_text('[{"rank": 2, "ho')
    (folder / "strange.json").write_text('[{"rank": 2}]')
    (folder / "rank_00003.json").write_text(json.dumps(asdict(Beat(3, "an", 1, 1, "earlier version"))))
    assert list(read_beats(tmp_path / "run")) == [0]


def test_a_call_is_passed_on_to_the_node_and_no_further(rank: Rank) -> None:
    here, beside, elsewhere = rank(0), rank(1), rank(2, node="b")
    here.board.pass_on_call()
    assert (beside.board.is_called, elsewhere.board.is_called) == (True, False)
    assert not rank(3).board.is_called, "a call from before it began is not its own"


def test_without_a_folder_for_the_board_each_rank_is_a_node(
    rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_board, "places", lambda: [tmp_path / "nowhere"])
    ranks = [rank(0, 2), rank(1, 2)]
    beat(*ranks, times=3)
    assert len(files(tmp_path / "run")) == 2
    assert {number: one.number for number, one in ranks[0].read().items()} == {0: 3, 1: 3}
    assert all(one.is_writer for one in ranks)


def test_the_board_is_gone_with_its_last_rank(tmp_path: Path) -> None:
    first, second = (NodeBoard(tmp_path / "run", number, [tmp_path]) for number in range(2))
    first.put(Beat(0, "h", 1, 1, "step 1"))
    assert list(second.beats()) == [0]
    first.close()
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["dsbeats"]
    second.close()
    second.put(replace(Beat(1, "h", 1, 1, "step 1")))
    assert list(tmp_path.iterdir()) == []
