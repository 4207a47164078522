"""Who is to blame for the end of a gang, and what is said of it."""

from __future__ import annotations

import pickle

import pytest

from megatron_deepstack.errors import (
    CheckpointError,
    LayoutError,
    RankError,
)
from megatron_deepstack.training.retry import Failure
from orchestration.launch.gang.policy import Diagnosis, End, RankEnd, diagnose, end_of_exception
from orchestration.launch.gang.rank import RankFailed


def failure(rank: int, end: End, text: str = "x", error: Exception | None = None) -> RankEnd:
    return RankEnd(rank, f"pid {rank} on host", end, text, error)  # type: ignore[arg-type]


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
        ("ended", "failure_of_gang"),
        [
            (failure(0, End.DIED, "killed"), Failure()),
            (failure(0, End.CUT_OFF, "RuntimeError: Connection reset by peer"), Failure()),
            (failure(0, End.HUNG, "the run hangs"), Failure()),
            (failure(0, End.RAISED, "ValueError: a"), Failure(exception="ValueError: a")),
        ],
    )
    def test_what_the_next_attempt_depends_on(self, ended: RankEnd, failure_of_gang: Failure) -> None:
        assert Diagnosis((ended,), ()).failure == failure_of_gang

    def test_the_next_attempt_depends_on_an_expected_failure(self) -> None:
        mistake = CheckpointError("another model")
        found = diagnose([failure(0, End.REFUSED, "another model", mistake), failure(1, End.RAISED, "x")]).failure
        assert (found.error, found.exception) == (mistake, "")

    def test_an_error_survives_the_way_from_the_rank(self) -> None:
        sent = RankFailed("pid 1 on host", "ConfigError", "a\nb", LayoutError(["a", "b"]))
        got = pickle.loads(pickle.dumps(sent))
        assert isinstance(got.error, LayoutError)
        assert (got.where, got.kind, got.text, got.error.problems) == (sent.where, "ConfigError", "a\nb", ("a", "b"))
        found = diagnose([RankEnd(0, got.where, End.REFUSED, got.text, got.error)])
        assert found.error is got.error
