"""What a checkpoint holds, as Megatron's sharded state dict: decoder, encoder, optimizer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.optimizer import ChainedOptimizer

from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.encoder import VisualEncoder

OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Optimizer states that any layout can read."""


def sharded_state(model: RankModel, optimizer: ChainedOptimizer | None, *, loading: bool) -> dict[str, Any]:
    """Sharded state dict of this rank; without `optimizer`, the weights alone. Collective over all ranks.

    Keys name global layers, so a checkpoint does not remember its layout. The encoder stands on every rank, so its
    replica number is the global rank: rank 0 writes it.
    """
    weights: ShardedStateDict = {}
    for number, chunk in enumerate(model.chunks):
        weights[f"decoder{number}"] = chunk.sharded_state_dict(metadata=dict(OPTIMIZER_METADATA))
    weights["encoder"] = _encoder_state(model.encoder)
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=dict(OPTIMIZER_METADATA)
        )
    return state


def _encoder_state(encoder: VisualEncoder) -> ShardedStateDict:
    return {
        name: ShardedTensor.from_rank_offsets(f"encoder.{name}", parameter, replica_id=dist.get_rank())
        for name, parameter in encoder.named_parameters()
    }


def load_weights(model: RankModel, state: dict[str, Any]) -> None:
    """Copy loaded weights into the modules; extra states without data (Transformer Engine's) are left out."""
    for number, chunk in enumerate(model.chunks):
        chunk.load_state_dict(state["model"][f"decoder{number}"], strict=False)
    model.encoder.load_state_dict(state["model"]["encoder"])
