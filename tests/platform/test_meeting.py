"""How ranks meet before there is a process group: a taken port, and a problem that one of them has."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_deepstack.errors import ConfigError, DeepStackError, StoreError
from megatron_deepstack.platform.processes import process_group


def meet(problems: list[DeepStackError | None]) -> list[DeepStackError | None]:
    """What each rank raises."""
    store = dist.HashStore()
    raised: list[DeepStackError | None] = [None] * len(problems)

    def rank(number: int) -> None:
        try:
            process_group._agree(store, number, len(problems), problems[number], timedelta(seconds=60))
        except DeepStackError as error:
            raised[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_no_problem() -> None:
    assert meet([None, None, None]) == [None, None, None]


def test_every_rank_raises_what_one_met() -> None:
    raised = meet([None, None, StoreError("not here")])
    assert [(str(error), error.rank, error.agreed) for error in raised if error is not None] == [
        ("not here", 2, True)
    ] * 3


def test_what_all_met_alike_names_no_rank() -> None:
    raised = meet([ConfigError(["a", "b"]), ConfigError(["a", "b"])])
    assert [(error.problems, error.rank) for error in raised if isinstance(error, ConfigError)] == [
        (("a", "b"), None)
    ] * 2


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("by_hand")
def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError) as caught:
            process_group.join(5.0)
    (line,) = caught.value.problems
    assert f"MASTER_PORT={port} cannot be opened on {socket.gethostname()}: another process has it" in line
    assert "torchrun: --master-port, or --standalone" in line


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("MASTER_PORT", "many", "MASTER_PORT='many', expected a free port"), ("WORLD_SIZE", "two", "WORLD_SIZE='two'")],
)
def test_variables_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        process_group.join(5.0)
