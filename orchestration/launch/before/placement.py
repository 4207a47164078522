"""Which rank runs on which node, as a pure function of the nodes' free slots and the layout.

A slot is a GPU with the CPUs that go with it, or those CPUs alone where no node has a GPU. Ranks are numbered node by
node, tensor-parallel fastest, so ranks that talk most are neighbours on one node and pipeline neighbours lie on the
same node or the next one. A node takes whole tensor-parallel groups; Ray's own packing knows nothing of them, and
would split one over two nodes where others hold some of a node's GPUs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.errors import ClusterError, LayoutError
from megatron_deepstack.parallel.axes import Place, axes_for
from megatron_deepstack.planning.check import model_ranks


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, with what is free on it."""

    id: str
    """Ray's name for it."""
    address: str
    host: str
    gpus: int
    cpus: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs."""

    rank: int
    node: Node
    place: Place
    """Its coordinates in the layout."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks of a cluster."""

    num_ranks: int
    parallel: ParallelConfig
    cpus_per_rank: int
    uses_gpus: bool

    @property
    def resources(self) -> Mapping[str, float]:
        """Of one rank, in Ray's words."""
        return {"CPU": self.cpus_per_rank, "GPU": 1} if self.uses_gpus else {"CPU": self.cpus_per_rank}

    @property
    def unit(self) -> str:
        """A slot in words."""
        cpus = f"{self.cpus_per_rank} CPU{'s' if self.cpus_per_rank > 1 else ''}"
        return f"1 GPU and {cpus}" if self.uses_gpus else cpus

    def slots(self, node: Node) -> int:
        """Ranks that fit on a node, in whole tensor-parallel groups."""
        return self.free(node) // self.parallel.tensor * self.parallel.tensor

    def free(self, node: Node) -> int:
        """Slots of a node."""
        slots = node.cpus // self.cpus_per_rank
        return min(slots, node.gpus) if self.uses_gpus else slots


def demand_of(recipe: Recipe, nodes: Sequence[Node], num_ranks: int | None = None) -> Demand:
    """One worker per GPU, or per CPU slot where no node has a GPU; one replica of the model if nothing else is said.

    Args:
        recipe: The run's recipe.
        nodes: The nodes of the cluster that are alive.
        num_ranks: Number of ranks; if None, `launch.ranks`, and without that the ranks of one replica.

    Returns:
        What the run needs.
    """
    return Demand(
        num_ranks=num_ranks or recipe.launch.ranks or model_ranks(recipe.parallel),
        parallel=recipe.parallel,
        cpus_per_rank=recipe.launch.cpus_per_rank,
        uses_gpus=any(node.gpus for node in nodes),
    )


def check_groups_fit(demand: Demand, nodes: Sequence[Node]) -> None:
    """Check that some node is large enough for a tensor-parallel group, with all slots that it has, free or not.

    Args:
        demand: What the run needs.
        nodes: The nodes of the cluster that are alive.

    Raises:
        LayoutError: Nodes have free slots, but none has enough slots for a group.
    """
    largest = max(nodes, key=demand.slots, default=None)
    tensor = demand.parallel.tensor
    if largest is None or demand.slots(largest) >= tensor or not any(map(demand.free, nodes)):
        return
    raise LayoutError(
        [
            f"parallel.tensor: a group of {tensor} ranks stays inside one node, and none has {tensor} x {demand.unit}: "
            f"{describe(nodes)}; use a smaller parallel.tensor, or larger nodes"
        ]
    )


def place(demand: Demand, nodes: Sequence[Node]) -> tuple[Seat, ...]:
    """Choose seats, on as few nodes as possible.

    Args:
        demand: What the run needs.
        nodes: The nodes of the cluster that are alive.

    Returns:
        One seat for each rank, by rank. Nodes are in order of their addresses, so that a restart on the same nodes
        gives the same ranks the same seats.

    Raises:
        ClusterError: The nodes have fewer slots than ranks.
    """
    ordered = sorted(nodes, key=_address_order)
    tensor = demand.parallel.tensor
    by_size = sorted(ordered, key=demand.slots, reverse=True)
    left, taken = demand.num_ranks, {}
    for node in by_size:
        taken[node.id] = min(left, demand.slots(node))
        left -= taken[node.id]
    if left:
        raise ClusterError(
            f"{demand.num_ranks} ranks need {demand.num_ranks} x {demand.unit}"
            f"{f' in groups of {tensor} on one node' if tensor > 1 else ''}; {left} are missing: {describe(nodes)}"
        )
    axes = axes_for(demand.parallel, demand.num_ranks)
    of_rank = [node for node in ordered for _ in range(taken[node.id])]
    return tuple(Seat(rank, node, axes.place(rank)) for rank, node in enumerate(of_rank))


def neighbours(seats: Sequence[Seat]) -> list[tuple[Node, Node]]:
    """Pairs of nodes whose ranks follow each other, the last and the first too: the ring that collectives run on."""
    nodes = list({seat.node.id: seat.node for seat in seats}.values())
    if len(nodes) < 2:
        return []
    ring = list(pairwise(nodes))
    return ring if len(nodes) == 2 else [*ring, (nodes[-1], nodes[0])]


def describe(nodes: Sequence[Node]) -> str:
    """What is free, node by node."""
    if not nodes:
        return "the cluster has no nodes"
    return ", ".join(f"{node.address} has {node.gpus} GPUs and {node.cpus} CPUs" for node in nodes)


def _address_order(node: Node) -> tuple[int, int, str]:
    """10.0.0.9 before 10.0.0.10."""
    try:
        address = ipaddress.ip_address(node.address)
    except ValueError:
        return (99, 0, node.address)
    return (address.version, int(address), node.id)
