"""What a checkpoint holds, as Megatron's sharded state dict: decoder, encoder, optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

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
        if loading:
            _prepare_torch_adam(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=dict(OPTIMIZER_METADATA)
        )
    return state


def _prepare_torch_adam(optimizer: ChainedOptimizer) -> None:
    """Make torch's Adam, which runs where neither Apex nor Transformer Engine is, loadable by Megatron.

    Its states appear in its first step, but the distributed optimizer loads into existing ones. And its `step` is a
    state per parameter: the distributed optimizer saves one in the groups, restores it as one tensor that all
    parameters share, so that each would count it up for all, and then looks for it among the parameter's own tensors
    (0.16 and 0.19 alike). So each parameter gets its own copy, and is handed it.
    """
    for single in optimizer.chained_optimizers:
        inner = single.optimizer
        if not isinstance(inner, torch.optim.Adam):
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.zeros(()), **zeros}
        if isinstance(single, DistributedOptimizer):
            single._set_main_param_and_optimizer_states = partial(_set_with_step, single)


def _set_with_step(single: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, place = single.model_param_group_index_map[model_param]
    main_param = single.optimizer.param_groups[group]["params"][place]
    state = single.optimizer.state[main_param]
    state["step"] = state["step"].clone()
    DistributedOptimizer._set_main_param_and_optimizer_states(single, model_param, {"step": state["step"], **tensors})


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
