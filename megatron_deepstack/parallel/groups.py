"""Megatron's process groups, and the two of our own: a replica's ranks, and the encoder's.

A *replica* is the cp x pp x tp ranks with one dp index: they work on the same samples, and the stacks' rows travel
among them. The encoder is replicated on all ranks of all replicas, so its gradients are reduced over the whole world.
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
    """All process groups of a run, as this rank sees them."""

    axes: Axes
    place: Place
    replica: dist.ProcessGroup
    """Ranks of this rank's replica, in replica order; the exchange of rows runs here and nothing else does."""
    encoder: ProcessGroupCollection
    """The encoder's view of the world: data-parallel over all ranks, nothing else parallel."""
    decoder: ProcessGroupCollection
    """Megatron's groups."""

    @property
    def replica_rank(self) -> int:
        """Rank within the replica."""
        return self.axes.replica_rank(tp=self.place.tp, cp=self.place.cp, pp=self.place.pp)


def create_groups(parallel: ParallelConfig, seed: int, timeout_seconds: float = DEFAULT_SECONDS) -> Groups:
    """Create every group. Collective over all ranks, in the same order on each; Megatron's state becomes global.

    `timeout_seconds` is the longest wait of a collective: each group has its own, and none takes it from another.
    Replaces the groups of an earlier call, so that one set of ranks can try several layouts.
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
    """Every rank in one data-parallel group; a group of one for every other axis."""
    world_size = dist.get_world_size()
    world = dist.new_group(range(world_size), timeout=timeout)
    alone = None
    for rank in range(world_size):
        group = dist.new_group([rank], timeout=timeout)
        if rank == dist.get_rank():
            alone = group
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
