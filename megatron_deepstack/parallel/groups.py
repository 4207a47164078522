"""Megatron's process groups, and two further ones: the ranks of a replica, and the groups of the encoder.

A *replica* is the cp x pp x tp ranks with one dp index. They work on the same samples and exchange the rows of stacks
with each other. Every rank of every replica has a copy of the encoder, so its gradients are reduced over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.parallel.axes import Axes, Place, axes_for
from megatron_deepstack.platform.processes.process_group import DEFAULT_SECONDS


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of a run to which this rank belongs."""

    axes: Axes
    place: Place
    """This rank's place on the axes."""
    replica: dist.ProcessGroup
    """The ranks of this rank's replica, in replica order. Only the exchange of rows uses this group."""
    encoder: ProcessGroupCollection
    """The groups of the encoder: data-parallel over all ranks, and not parallel on any other axis."""
    decoder: ProcessGroupCollection
    """Megatron's groups, which the decoder uses."""

    @property
    def replica_rank(self) -> int:
        """Rank within the replica."""
        return self.axes.replica_rank(tp=self.place.tp, cp=self.place.cp, pp=self.place.pp)


def create_groups(parallel: ParallelConfig, seed: int, timeout_seconds: float = DEFAULT_SECONDS) -> Groups:
    """Create all process groups, and set Megatron's global state. Collective over all ranks.

    The groups replace those of an earlier call, so that one set of ranks can try several layouts.

    Args:
        parallel: The recipe's layout.
        seed: Seed of Megatron's random states, which differ between tensor-parallel ranks.
        timeout_seconds: Longest wait of a collective. It is given to each group, since groups do not inherit it.

    Returns:
        The groups of this rank.

    Raises:
        LayoutError: The ranks do not divide into whole replicas.
    """
    timeout = timedelta(seconds=timeout_seconds)
    axes = axes_for(parallel, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60.0,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    place = axes.place(dist.get_rank())
    return Groups(
        axes=axes,
        place=place,
        replica=_replica_group(axes, place, timeout),
        encoder=_encoder_groups(timeout),
        decoder=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _replica_group(axes: Axes, place: Place, timeout: timedelta) -> dist.ProcessGroup:
    mine = None
    for dp in range(axes.dp):
        group = dist.new_group(axes.replica_ranks(dp), timeout=timeout)
        if dp == place.dp:
            mine = group
    assert mine is not None
    return mine


def _encoder_groups(timeout: timedelta) -> ProcessGroupCollection:
    """Put all ranks into one data-parallel group, and each rank alone into the group of every other axis.

    The group of one rank is the one that Megatron has made for the tensor parallelism of experts, which are never
    split: creating a group for every rank would be as many meetings of all ranks as there are ranks.
    """
    world = dist.new_group(range(dist.get_world_size()), timeout=timeout)
    alone = parallel_state.get_expert_tensor_parallel_group()
    assert alone.size() == 1, "experts are not split over tensor parallelism"
    return ProcessGroupCollection(
        tp=alone,
        pp=alone,
        cp=alone,
        ep=alone,
        mp=alone,
        tp_cp=alone,
        tp_ep_pp=alone,
        expt_tp=alone,
        expt_dp=world,
        intra_expt_dp=world,
        dp=world,
        dp_cp=world,
        intra_dp_cp=world,
        intra_dist_opt=world,
        embd=None,
        pos_embd=None,
    )
