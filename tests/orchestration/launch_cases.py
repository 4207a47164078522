"""Nodes and demands for the tests of launching."""

from __future__ import annotations

from megatron_deepstack.config.schema import ParallelConfig
from orchestration.launch.before.placement import Demand, Node


def node(number: int, gpus: int = 8, cpus: int = 64) -> Node:
    return Node(f"id{number}", f"10.0.0.{number}", f"host{number}", gpus, cpus)


def demand(num_ranks: int, *, cpus: int = 1, gpus: bool = True, **axes: int) -> Demand:
    return Demand(num_ranks, ParallelConfig(**axes), cpus, gpus)
