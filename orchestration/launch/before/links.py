"""Trying the links between neighbouring nodes: a pure function plans the rounds, and the rest carries them out.

A node takes part in one trial at a time. In a ring each node has two neighbours, so two rounds reach all pairs of an
even number of nodes, three of an odd one, however many nodes there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from orchestration.launch.before.checks import Link
from orchestration.launch.before.placement import Node

LINK_SECONDS: Final = 60.0
"""For the two sides to meet, and for the all-reduce."""
_PORT_SECONDS: Final = 60.0
"""For a node to open the port where both sides meet."""
ROUND_SECONDS: Final = _PORT_SECONDS + 2 * LINK_SECONDS
"""Longest that a round takes."""

Pair = tuple[Node, Node]


def rounds_of(pairs: Sequence[Pair]) -> tuple[tuple[Pair, ...], ...]:
    """Rounds of pairs that share no node; each pair is in the first round where both its nodes are free.

    Args:
        pairs: Neighbours in the order of their ring.

    Returns:
        The rounds, each with its pairs in that order.
    """
    rounds: list[list[Pair]] = []
    busy: list[set[str]] = []
    for pair in pairs:
        ids = {node.id for node in pair}
        free = (number for number, taken in enumerate(busy) if not taken & ids)
        number = next(free, len(rounds))
        if number == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[number].append(pair)
        busy[number] |= ids
    return tuple(map(tuple, rounds))


def try_links(ray: Any, probes: Mapping[str, Any], pairs: Sequence[Pair]) -> list[Link]:
    """Try all pairs, round by round, the pairs of a round side by side.

    Args:
        ray: Ray, connected.
        probes: The actor on each node, by the node's id; see `preflight.Probe`.
        pairs: Neighbours, see `placement.neighbours`.

    Returns:
        What came of each pair, in the order of `pairs`.
    """
    found: dict[tuple[str, str], Link] = {}
    for one_round in rounds_of(pairs):
        for pair, link in zip(one_round, _try_round(ray, probes, one_round), strict=True):
            found[_ids(pair)] = link
    return [found[_ids(pair)] for pair in pairs]


def _try_round(ray: Any, probes: Mapping[str, Any], pairs: Sequence[Pair]) -> list[Link]:
    """All meeting points are opened first, then both sides of every pair meet in theirs."""
    ports = [probes[first.id].open_meeting_point.remote(first.address) for first, _ in pairs]
    ray.wait(ports, num_returns=len(ports), timeout=_PORT_SECONDS)
    sides: dict[int, list[Any]] = {}
    links: dict[int, Link] = {}
    for number, pair in enumerate(pairs):
        port = _get(ray, ports[number], pair, _PORT_SECONDS)
        if isinstance(port, Link):
            links[number] = port
        else:
            sides[number] = [
                probes[node.id].try_link.remote(rank, node.address, pair[0].address, port)
                for rank, node in enumerate(pair)
            ]
    running = [side for both in sides.values() for side in both]
    if running:
        ray.wait(running, num_returns=len(running), timeout=2 * LINK_SECONDS)
    for number, both in sides.items():
        seconds = _get(ray, both, pairs[number], 2 * LINK_SECONDS)
        links[number] = seconds if isinstance(seconds, Link) else Link(*_addresses(pairs[number]), seconds=max(seconds))
    return [links[number] for number in range(len(pairs))]


def _get(ray: Any, reference: Any, pair: Pair, waited: float) -> Any:
    """The results that have come back by now; a link without one counts as broken."""
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return Link(*_addresses(pair), None, f"no way through within {waited:.0f} s")
    except ray.exceptions.RayError as error:
        return Link(*_addresses(pair), None, str(error).strip().splitlines()[-1])


def _addresses(pair: Pair) -> tuple[str, str]:
    return pair[0].address, pair[1].address


def _ids(pair: Pair) -> tuple[str, str]:
    return pair[0].id, pair[1].id
