"""States of the distributed optimizer in a checkpoint: each rank's own shards, cut so that any layout can read them.

Megatron's format for this (`fully_reshardable`) has every data-parallel rank gather the states of its whole stage in
host memory, in the training thread, on every save, and read all of them on loading. Here each rank saves and reads
what it holds: a shard is a range of a flattened parameter, which is at most a few boxes of it. Keys and shapes are
Megatron's, and so is what a reader sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_deepstack.checkpoint.content.boxes import Box, boxes
from megatron_deepstack.checkpoint.content.engine_adam import live_states

MAIN_PARAMETER = "fp32_param"
"""Name of float32 main parameters, as optimizers that are not distributed save them."""
OLD_MAIN_PARAMETER = "param"
"""Their name in checkpoints of format version 1, written by a distributed optimizer."""


def sharded_states(
    optimizer: DistributedOptimizer, weights: ShardedStateDict, main_parameter: str = MAIN_PARAMETER
) -> dict[str, ShardedTensor]:
    """This rank's states as parts of the checkpoint's tensors; their data are views of the live ones.

    Saving reads the views, and loading writes into them.

    Args:
        optimizer: The distributed optimizer, with its states allocated.
        weights: The model's sharded weights, which say where each parameter lies in the whole tensor.
        main_parameter: Name under which main parameters are saved.

    Returns:
        The parts by a key that is unique on this rank.
    """
    found, _ = extract_sharded_tensors_and_factories(weights)
    by_parameter = {id(sharded.data): sharded for sharded in nested_values(found)}
    parts = [
        part
        for parameter, start, tensors in _local_states(optimizer, main_parameter)
        for name, tensor in tensors.items()
        for part in _parts(by_parameter[id(parameter)], name, start, tensor.view(-1))
    ]
    return {f"{part.key} {part.global_offset}": part for part in parts}


def _local_states(
    optimizer: DistributedOptimizer, main_parameter: str
) -> Iterator[tuple[torch.Tensor, int, dict[str, torch.Tensor]]]:
    """(parameter, where this rank's range of it begins, its flat states by name).

    A float32 parameter is its own main parameter and is saved with the weights.
    """
    for ranges_by_dtype in optimizer.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    found = live_states(optimizer, parameter)
                    tensors = {name: found[name] for name in ("exp_avg", "exp_avg_sq")}
                    if parameter.dtype != torch.float32:
                        tensors[main_parameter] = found["param"]
                    yield parameter, ranges["param"].start, tensors


def _parts(
    weight: ShardedTensor | ShardedTensorFactory, name: str, start: int, tensor: torch.Tensor
) -> Iterator[ShardedTensor]:
    """`tensor`, elements from `start` on of a state of the flattened local `weight`, as boxes of the global state."""
    named = replace(weight, key=f"optimizer.state.{name}.{weight.key}")
    for piece in nested_values(named.build()) if isinstance(named, ShardedTensorFactory) else [named]:
        begin = _begin(piece.data, weight.data)
        done = max(start, begin)
        for box in boxes(piece.local_shape, done - begin, min(start + len(tensor), begin + piece.data.numel()) - begin):
            data = tensor[done - start : done - start + box.numel]
            yield _box_of(piece, box, data)
            done += box.numel


def _begin(piece: torch.Tensor, whole: torch.Tensor) -> int:
    """Where a factory's piece begins in the flattened parameter; whole parameters are their own only piece."""
    assert piece.is_contiguous(), "a piece of a parameter that is not one range of it cannot be cut by ranges"
    assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return int(piece.storage_offset() - whole.storage_offset())


def _box_of(piece: ShardedTensor, box: Box, data: torch.Tensor) -> ShardedTensor:
    """A box of a piece; its owner is the only one, so its replica number says so along data-parallel ranks."""
    stacked = piece.prepend_axis_num
    offset = [begin + more for begin, more in zip(piece.global_offset[stacked:], box.offset, strict=True)]
    shape = (*[1] * stacked, *box.shape)
    replica = piece.replica_id
    return ShardedTensor(
        key=piece.key,
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        global_shape=piece.global_shape,
        global_offset=(*piece.global_offset[:stacked], *offset),
        axis_fragmentations=None,
        replica_id=(*replica[:-1], 0) if isinstance(replica, tuple) else 0,
        allow_shape_mismatch=piece.allow_shape_mismatch,
    )
