"""Trying links: every pair once, no node twice in a round, few rounds, and all pairs of a round side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from launch_cases import demand, node

from orchestration.launch.before.checks import Link
from orchestration.launch.before.links import LINK_SECONDS, ROUND_SECONDS, rounds_of, try_links
from orchestration.launch.before.placement import Node, neighbours, place
from orchestration.launch.before.preflight import longest_check_seconds


def ring(num_nodes: int) -> list[tuple[Node, Node]]:
    seats = place(demand(8 * num_nodes, tensor=8), [node(number) for number in range(1, num_nodes + 1)])
    return neighbours(seats)


@pytest.mark.parametrize(
    ("num_nodes", "num_rounds"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 3), (6, 2), (7, 3), (16, 2), (127, 3), (128, 2)]
)
def test_rounds(num_nodes: int, num_rounds: int) -> None:
    pairs = ring(num_nodes)
    rounds = rounds_of(pairs)
    assert len(rounds) == num_rounds
    assert {(a.id, b.id) for each in rounds for a, b in each} == {(a.id, b.id) for a, b in pairs}
    assert sum(map(len, rounds)) == len(pairs)
    for each in rounds:
        ids = [one.id for pair in each for one in pair]
        assert len(ids) == len(set(ids)), "a node takes part in one trial at a time"


class Silence(Exception):
    """Ray's own, where an answer does not come in time."""


class Broken(Exception):
    """Ray's own, around what a task raised."""


@dataclass
class FakeRay:
    """Answers when it is asked for; notes what was handed out before each wait."""

    waits: list[list[str]] = field(default_factory=list)
    exceptions: Any = field(default_factory=lambda: SimpleNamespace(GetTimeoutError=Silence, RayError=Broken))

    def wait(self, references: Sequence[Any], *, num_returns: int, timeout: float) -> None:
        assert num_returns == len(references)
        self.waits.append([name for name, _ in references])

    def get(self, references: Any, *, timeout: float) -> Any:
        assert timeout == 0, "everything was waited for together"
        return [one[1]() for one in references] if isinstance(references, list) else references[1]()


def probes(nodes: Sequence[Node], side: Callable[[str, str], float]) -> dict[str, Any]:
    """Actors whose `try_link` does `side(own address, address of the meeting point)`."""

    def actor(one: Node) -> Any:
        def open_port(address: str) -> tuple[str, Callable[[], int]]:
            return f"port {one.address[-1]}", lambda: 1000

        def try_link(rank: int, own: str, address: str, port: int) -> tuple[str, Callable[[], float]]:
            assert port == 1000
            return f"{rank}:{own[-1]}-{address[-1]}", lambda: side(own, address)

        return SimpleNamespace(
            open_meeting_point=SimpleNamespace(remote=open_port), try_link=SimpleNamespace(remote=try_link)
        )

    return {one.id: actor(one) for one in nodes}


def test_the_pairs_of_a_round_are_tried_side_by_side() -> None:
    ray, nodes = FakeRay(), [node(number) for number in (1, 2, 3, 4)]
    links = try_links(ray, probes(nodes, lambda own, _: 0.001 * int(own[-1])), ring(4))
    assert ray.waits == [
        ["port 1", "port 3"], ["0:1-1", "1:2-1", "0:3-3", "1:4-3"],
        ["port 2", "port 4"], ["0:2-2", "1:3-2", "0:4-4", "1:1-4"],
    ]  # fmt: skip
    assert [(one.first[-1], one.second[-1], one.seconds) for one in links] == [
        ("1", "2", 0.002), ("2", "3", 0.003), ("3", "4", 0.004), ("4", "1", 0.004),
    ]  # fmt: skip


def test_a_broken_link_and_a_silent_one_leave_the_others_alone() -> None:
    def side(own: str, address: str) -> float:
        if own.endswith("2") and address.endswith("1"):
            raise Broken("at the top\nConnection refused")
        if own.endswith("3") and address.endswith("3"):
            raise Silence
        return 0.001

    links = try_links(FakeRay(), probes([node(number) for number in (1, 2, 3, 4)], side), ring(4))
    assert links == [
        Link("10.0.0.1", "10.0.0.2", None, "Connection refused"),
        Link("10.0.0.2", "10.0.0.3", 0.001),
        Link("10.0.0.3", "10.0.0.4", None, f"no way through within {2 * LINK_SECONDS:.0f} s"),
        Link("10.0.0.4", "10.0.0.1", 0.001),
    ]


def test_a_node_that_opens_no_port() -> None:
    actors = probes([node(1), node(2)], lambda *_: 0.001)

    def refuse() -> int:
        raise Broken("no free port")

    actors["id1"].open_meeting_point = SimpleNamespace(remote=lambda _: ("port 1", refuse))
    assert try_links(FakeRay(), actors, ring(2)) == [Link("10.0.0.1", "10.0.0.2", None, "no free port")]


@pytest.mark.parametrize(("num_nodes", "rounds"), [(1, 0), (2, 1), (128, 2), (127, 3)])
def test_the_longest_check_does_not_grow_with_the_cluster(num_nodes: int, rounds: int) -> None:
    seats = place(demand(8 * num_nodes, tensor=8), [node(number) for number in range(1, num_nodes + 1)])
    assert longest_check_seconds(seats) == 360 + rounds * ROUND_SECONDS
