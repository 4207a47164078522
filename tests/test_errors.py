"""Errors that ranks agree on, and how they travel."""

from __future__ import annotations

import pickle

import pytest

from megatron_deepstack.errors import (
    ConfigError,
    DeepStackError,
    RunFolderError,
    StoreError,
    agreed_error,
    of_all_ranks,
)

CASES: dict[str, tuple[dict[int, DeepStackError], int | None, str]] = {
    "one rank": ({1: StoreError("gone")}, 1, "gone"),
    "all say the same": ({0: StoreError("gone"), 1: StoreError("gone")}, None, "gone"),
    "both, of different things": ({0: StoreError("a"), 1: StoreError("b")}, 0, "a"),
    "agreed on before": ({0: of_all_ranks(StoreError("gone"))}, None, "gone"),
}


@pytest.mark.parametrize(("met", "rank", "words"), CASES.values(), ids=CASES)
def test_one_error_for_all_ranks(met: dict[int, DeepStackError], rank: int | None, words: str) -> None:
    error = agreed_error({one: (f"host{one}", error) for one, error in met.items()}, 2)
    assert (error.agreed, error.rank, str(error)) == (True, rank, words)
    assert error.host == (None if rank is None else f"host{rank}")


@pytest.mark.parametrize("error", [RunFolderError("full"), ConfigError(["one", "two"])], ids=["plain", "config"])
def test_errors_travel_with_the_rank_that_met_them(error: DeepStackError) -> None:
    error.rank, error.host, error.agreed = 3, "there", True
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.rank, found.host, found.agreed) == (
        type(error),
        str(error),
        3,
        "there",
        True,
    )
    assert getattr(found, "problems", ()) == getattr(error, "problems", ())
