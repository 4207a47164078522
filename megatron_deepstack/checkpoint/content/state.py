"""What a checkpoint holds, as Megatron's sharded state dict: decoder, encoder, optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_deepstack.checkpoint.content import engine_adam
from megatron_deepstack.checkpoint.content.optimizer_shards import MAIN_PARAMETER, OLD_MAIN_PARAMETER, sharded_states
from megatron_deepstack.checkpoint.folder import FORMAT_VERSION
from megatron_deepstack.checkpoint.trust import is_extra_state
from megatron_deepstack.config.choices import Fp8Scaling
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.language import LanguageChunk
from megatron_deepstack.model.layers.lora import is_adapter
from megatron_deepstack.model.vision.encoder import VisualEncoder

FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Keys of the norms before linears in a layer, to those of Transformer Engine's layers, which own them together: so
that each kind of layers reads what the other wrote. Experts have a norm apart in both, which follows the same rule."""
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Keys of optimizer states that any layout can read."""


def sharded_state(
    model: RankModel, optimizer: ChainedOptimizer | None, *, version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """This rank's part of a checkpoint, as Megatron's sharded state dict. No rank waits for another here.

    Keys name global layers, so a checkpoint does not remember its layout. The encoder is on every rank, so its
    replica number is the global rank: rank 0 writes it.

    Args:
        model: What this rank holds.
        optimizer: This rank's optimizer, with its states allocated; None for the weights alone.
        version: Format version of the checkpoint that is written or read, which decides some keys.

    Returns:
        `model`, with a state dict for each chunk and one for the encoder, and `optimizer`. The tensors are the live
        ones: saving reads them, and loading writes into those of the optimizer.
    """
    weights: ShardedStateDict = {}
    for number, chunk in enumerate(model.chunks):
        weights[f"decoder{number}"] = _decoder_state(model, chunk, version)
    weights["encoder"] = _encoder_state(model.encoder)
    state: dict[str, Any] = {"model": weights}
    main_parameter = OLD_MAIN_PARAMETER if version == 1 else MAIN_PARAMETER
    if optimizer is not None:
        for single in optimizer.chained_optimizers:
            if isinstance(single, DistributedOptimizer):
                single.sharded_state_dict = partial(_distributed_state, single, main_parameter=main_parameter)
        state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=dict(METADATA))
        for single, part in _parts(optimizer, state["optimizer"]):
            _number_main_parameters(single, part)
    return state


def _parts(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each optimizer with its part of a state."""
    singles = optimizer.chained_optimizers
    yield from zip(singles, [state] if len(singles) == 1 else state.values(), strict=True)


_GROUPS, _NUMBERED = "fp32_from_fp16_params", "main_parameters"
"""Megatron's key of the float32 copies of low-precision parameters, a list of groups; and ours, groups by number."""


def _keeps_groups(single: Any) -> bool:
    """Whether it is Megatron's optimizer of low-precision parameters that is not distributed."""
    return hasattr(single, "fp32_from_float16_groups")


def _number_main_parameters(single: Any, part: dict[str, Any]) -> None:
    """Take the groups of float32 copies out of their list, and leave out empty ones.

    A group is empty on a stage that holds nothing of its kind, as one with the embedding alone has no parameter without
    weight decay. Megatron keeps the empty groups of rank 0's list with what is common to all ranks, and cannot join
    that list with a rank's own of another length, not even in the layout that wrote it.
    """
    if _keeps_groups(single):
        part[_NUMBERED] = {number: group for number, group in enumerate(part.pop(_GROUPS)) if group}


def _list_main_parameters(single: Any, part: dict[str, Any]) -> None:
    """Put loaded groups back where Megatron takes them."""
    found = part.pop(_NUMBERED, {})
    part[_GROUPS] = [found.get(number, []) for number in range(len(single.fp32_from_float16_groups))]


def keeps_extra_states(model: RankModel) -> bool:
    """Whether layers keep more than weights: under delayed scaling the history of what they have seen."""
    return model.config.fp8 is not None and model.config.fp8_recipe == Fp8Scaling.DELAYED.value


def _decoder_state(model: RankModel, chunk: LanguageChunk, version: int) -> ShardedStateDict:
    state: ShardedStateDict = chunk.sharded_state_dict(metadata=dict(METADATA))
    if not keeps_extra_states(model):
        state = {name: part for name, part in state.items() if not is_extra_state(name)}
    if version >= 3:
        apply_prefix_mapping(state, _shared_norms("decoder.layers."))
    if version >= 4:  # where only some layers have experts, Megatron's keys number the layers
        for layer in range(chunk.chunk.first, chunk.chunk.stop):
            apply_prefix_mapping(state, _shared_norms(f"decoder.layers.{layer}."))
    return state


def _shared_norms(prefix: str) -> dict[str, str]:
    return {f"{prefix}{own}": f"{prefix}{shared}" for own, shared in FUSED_NORMS.items()}


def _distributed_state(
    single: DistributedOptimizer, weights: ShardedStateDict, *_: Any, main_parameter: str, **__: Any
) -> dict[str, Any]:
    """In place of Megatron's method, which gathers the states of all data-parallel ranks on each."""
    return {**engine_adam.common_state(single), "param_state": sharded_states(single, weights, main_parameter)}


def allocate_states(optimizer: ChainedOptimizer) -> None:
    """Make the states that an optimizer otherwise has from its first update on, all zero.

    Loading writes into them; and a run that starts from the beginning has all that a save plans for, before any update.
    """
    for single in optimizer.chained_optimizers:
        inner = single.optimizer
        if isinstance(inner, torch.optim.Adam):
            _allocate_torch_adam(inner)
        elif engine_adam.keeps_main_parameters(single):
            engine_adam.allocate(single)
        elif isinstance(single, DistributedOptimizer):
            single.load_state_dict(single.state_dict())
            for found in inner.state.values():  # Megatron allocates without clearing
                found["exp_avg"].zero_()
                found["exp_avg_sq"].zero_()
        elif inner is not None:
            single.init_state_fn(inner, single.config)


def _allocate_torch_adam(inner: torch.optim.Adam) -> None:
    """torch's Adam, which runs where neither Apex nor Transformer Engine is."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                counter = torch.zeros((), device=parameter.device if group["fused"] else None)
                inner.state[parameter] = {"step": counter, **zeros}


def load_optimizer(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> None:
    """Take over a loaded optimizer state; the distributed optimizer's tensors were loaded in place.

    Of what is common to all parameters only the number of updates is taken: rates and decay come from the recipe in
    every step, and the rest differs between optimizers that are distributed and not.

    Args:
        optimizer: This rank's optimizer, changed in place.
        state: The part `optimizer` of what was loaded into `sharded_state`'s result; changed.
    """
    updates = max(_updates(state), default=0.0)
    for single, part in _parts(optimizer, state):
        if isinstance(single, DistributedOptimizer):
            _set_updates(single, updates)
        elif single.optimizer is not None:
            if _keeps_groups(single):
                _list_main_parameters(single, part)
            inner = part["optimizer"] if _keeps_groups(single) else part
            inner["param_groups"] = single.optimizer.state_dict()["param_groups"]
            if isinstance(single.optimizer, torch.optim.Adam):
                inner["state"]["common_step"] = torch.tensor(updates)
            else:
                inner["param_groups"] = [{**group, "step": int(updates)} for group in inner["param_groups"]]
            single.load_state_dict(part)


def _updates(state: Any) -> Iterator[float]:
    """Adam's count of updates wherever an optimizer keeps it: for all parameters, or in its groups."""
    for key, value in state.items():
        if key in ("common_step", "step") and value is not None:
            yield float(value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _updates(inner)


def _set_updates(single: DistributedOptimizer, updates: float) -> None:
    """Megatron lets torch's Adam share one tensor of them among all parameters, each of which would count it up for
    all (0.16 and 0.19 alike). So each parameter gets its own.
    """
    if engine_adam.keeps_main_parameters(single):
        engine_adam.set_updates(single, int(updates))
        return
    own = single.state_dict()
    for group in own["optimizer"]["param_groups"]:
        group["step"] = updates if isinstance(single.optimizer, torch.optim.Adam) else int(updates)
    single.load_state_dict(own)
    if isinstance(single.optimizer, torch.optim.Adam):
        for found in single.optimizer.state.values():
            found["step"] = found["step"].clone()


def _encoder_state(encoder: VisualEncoder) -> ShardedStateDict:
    return {
        name: ShardedTensor.from_rank_offsets(f"encoder.{name}", parameter, replica_id=dist.get_rank())
        for name, parameter in encoder.named_parameters()
    }


def load_weights(model: RankModel, weights: dict[str, Any]) -> None:
    """Copy loaded weights into the modules.

    Args:
        model: What this rank holds; changed in place.
        weights: State dicts by part, as `sharded_state` names them. Extra states that are not kept are missing, and
            stay as they are; those that are kept were looked through before (`trust.check_extra_states`). So do
            adapters, of a checkpoint of weights alone.
    """
    for number, chunk in enumerate(model.chunks):
        with _pickles_allowed() if keeps_extra_states(model) else nullcontext():
            chunk.load_state_dict(weights[f"decoder{number}"], strict=False)
    missing, unexpected = model.encoder.load_state_dict(weights["encoder"], strict=False)
    lost = [name for name in missing if not is_extra_state(name) and not is_adapter(name)]
    assert not lost, f"a checkpoint's encoder lacks {lost}"
    assert not unexpected, f"a checkpoint's encoder has {unexpected}, which this one lacks"


_ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@contextmanager
def _pickles_allowed() -> Iterator[None]:
    """Let Transformer Engine unpickle extra states inside the block; since 2.20 it refuses to unless this is set."""
    before = os.environ.get(_ALLOW_PICKLES)
    os.environ[_ALLOW_PICKLES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_PICKLES]
        else:
            os.environ[_ALLOW_PICKLES] = before
