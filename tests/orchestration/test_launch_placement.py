"""Who sits where: ranks on nodes, whole tensor-parallel groups, neighbours."""

from __future__ import annotations

import pytest
from launch_cases import demand, node

from megatron_deepstack.errors import (
    ClusterError,
    LayoutError,
)
from orchestration.launch.before.placement import check_groups_fit, neighbours, place


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
