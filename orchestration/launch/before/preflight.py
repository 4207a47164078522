"""Asking all nodes at once what they have, and trying the links between neighbours, before a run starts.

On this machine alone the questions are answered by the driver itself; on a cluster by an actor on each node, which
holds the GPUs that the node's ranks will hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ClusterError
from megatron_deepstack.platform.network import interface_of
from orchestration.launch.before.checks import Check, failures, in_words, judge
from orchestration.launch.before.links import LINK_SECONDS, ROUND_SECONDS, rounds_of, try_links
from orchestration.launch.before.placement import Demand, Node, Seat, neighbours
from orchestration.launch.before.probe import NodeFacts, Questions, forget_tokens, gather, tokens_seen
from orchestration.launch.environment import RankEnvironment, take

_ANSWER_SECONDS: Final = 180.0
"""For a node to start a process, import torch, and look."""


def check_here(recipe: Recipe, demand: Demand, seats: Sequence[Seat], folder: str) -> tuple[Check, ...]:
    """The checks on this machine, by this process.

    Args:
        recipe: The run's recipe.
        demand: What the run needs.
        seats: Where each rank will run, all of them on this machine.
        folder: The current folder, from which relative paths count.

    Returns:
        All findings, good and bad.
    """
    questions, address = Questions(recipe, folder), seats[0].node.address
    try:
        facts = gather(questions, address, "here")
        seen = {address: tokens_seen(questions)}
    finally:
        forget_tokens(Path(recipe.run_dir))
    return judge(recipe, seats, [facts], seen, [], uses_gpus=demand.uses_gpus)


def check_cluster(
    ray: Any, recipe: Recipe, demand: Demand, seats: Sequence[Seat], folder: str, environment: RankEnvironment
) -> tuple[Check, ...]:
    """The checks on every node that ranks will run on.

    Args:
        ray: The module ray, connected to the cluster.
        recipe: The run's recipe.
        demand: What the run needs.
        seats: Where each rank will run, by rank.
        folder: The current folder, from which relative paths count on every node.
        environment: The variables that ranks receive.

    Returns:
        All findings, good and bad; a node that does not answer is one of them.
    """
    questions = Questions(recipe, folder, environment.private)
    nodes = list({seat.node.id: seat.node for seat in seats}.values())
    probes = {node.id: _probe_on(ray, node, demand, seats, environment) for node in nodes}
    try:
        facts, lost = _ask(ray, nodes, {n.id: probes[n.id].gather.remote(questions, n.address, n.id) for n in nodes})
        seen_by_id, _ = _ask(ray, nodes, {n.id: probes[n.id].tokens_seen.remote(questions) for n in nodes})
        links = try_links(ray, probes, neighbours(seats))
    finally:
        forget_tokens(Path(recipe.run_dir))
        for probe in probes.values():
            ray.kill(probe)
    heard: list[NodeFacts] = [facts[node.id] for node in nodes if node.id in facts]
    if not heard:
        return lost
    seen = {node.address: seen_by_id.get(node.id, ()) for node in nodes}
    return (*lost, *judge(recipe, seats, heard, seen, links, uses_gpus=demand.uses_gpus))


def longest_check_seconds(seats: Sequence[Seat]) -> float:
    """Longest that `check_cluster` may take."""
    return 2 * _ANSWER_SECONDS + len(rounds_of(neighbours(seats))) * ROUND_SECONDS


def require_sound(findings: Sequence[Check]) -> None:
    """Raise ClusterError that lists what is wrong where."""
    wrong = failures(findings)
    if wrong:
        raise ClusterError(f"{len(wrong)} of {len(findings)} checks failed, so nothing was started:\n{in_words(wrong)}")


class Probe:
    """An actor on a node; a process like the ranks' own."""

    def gather(self, questions: Questions, address: str, token: str) -> NodeFacts:
        """See `probe.gather`.

        Args:
            questions: What to look for.
            address: Address of this node.
            token: Name of the file that is left in the run folder.

        Returns:
            The facts of this node.
        """
        take(questions.environment)
        return gather(questions, address, token)

    def tokens_seen(self, questions: Questions) -> tuple[str, ...]:
        """See `probe.tokens_seen`."""
        return tokens_seen(questions)

    def open_meeting_point(self, address: str) -> int:
        """A store on this node."""
        from orchestration.launch.gang.rank import open_meeting_point

        return open_meeting_point(address)

    def try_link(self, rank: int, own: str, address: str, port: int) -> float:
        """One side of an all-reduce over the interface that holds `own`.

        Args:
            rank: 0 or 1: which side.
            own: Address of this node.
            address: Address of the node of side 0, where both meet.
            port: The port there.

        Returns:
            Seconds that it took.
        """
        import os

        from megatron_deepstack.parallel.link import try_link

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface_of(own) or "")
        return try_link(rank, address, port, LINK_SECONDS)


def _probe_on(ray: Any, node: Node, demand: Demand, seats: Sequence[Seat], environment: RankEnvironment) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ranks_here = sum(seat.node.id == node.id for seat in seats)
    return (
        ray.remote(Probe)
        .options(
            num_cpus=0,
            num_gpus=ranks_here if demand.uses_gpus else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            runtime_env={"env_vars": dict(environment.shown)},
        )
        .remote()
    )


def _ask(ray: Any, nodes: Sequence[Node], questions: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """Answers by node, and a finding for each node that gave none."""
    ray.wait(list(questions.values()), num_returns=len(questions), timeout=_ANSWER_SECONDS)
    answers, lost = {}, []
    for node in nodes:
        try:
            answers[node.id] = ray.get(questions[node.id], timeout=0)
        except ray.exceptions.GetTimeoutError:
            lost.append(_silence(node, f"no answer within {_ANSWER_SECONDS:.0f} s; are its GPUs free?"))
        except ray.exceptions.RayError as error:
            lost.append(_silence(node, str(error).strip().splitlines()[-1]))
    return answers, tuple(lost)


def _silence(node: Node, fault: str) -> Check:
    return Check(node.address, "a process of ours", fault, "an answer", False)
