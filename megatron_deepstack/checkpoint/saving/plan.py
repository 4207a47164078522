"""What each rank writes of a checkpoint: Megatron's plan of its distributed format, without the writing.

Megatron's own asynchronous callers do not fit here: the one that forks duplicates a process with gloo, CUDA and
prefetch threads (and 0.16 forks once more inside, which daemonic processes may not), the persistent one asks for the
number of CUDA devices, and neither copies CPU tensors, so that later values than those of the step would be
written. Its planner, metadata and file format are used as they are, in 0.16 and 0.19 alike.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

from megatron_deepstack.checkpoint.saving.writer import Item
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.platform.files.scratch import hold_new_here

TensorPart = tuple[str, tuple[int, ...]]
"""Key of a tensor in the checkpoint, and the offset of a rank's part in it."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One data file."""

    name: str
    objects: list[tuple[Item, bytes]]
    tensors: list[tuple[Item, torch.Tensor]]
    """Live tensors of model and optimizer."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What this rank writes."""

    files: list[PlannedFile]
    small_files: dict[str, bytes]
    """Files that are written as they are, by name; on rank 0 only."""
    metadata: Metadata | None
    """The checkpoint's index, complete except for where each tensor lies; on rank 0 only."""


class Planner:
    """Plans checkpoints whose structure stays the same, so that ranks exchange plans for the first ones only."""

    def __init__(self) -> None:
        self._strategy = _PlanOnly("torch_dist", 1, cached_metadata=True)
        self._checked = False

    def plan(self, state: dict[str, Any]) -> RankPlan:
        """Plan the sharded state dict `state`, which is used up. Collective over all ranks.

        Megatron writes its small common files at once; it is given a folder on this machine, so that nothing here waits
        for the checkpoint's disk. It sees stand-ins without data, since it would clone CPU tensors that are views.

        Raises CheckpointError where this machine has no place for that folder.
        """
        apply_factories(state)
        live, ours = {}, set()
        for place, tensor, is_ours in _take_data(state):
            live[place] = tensor
            if is_ours:
                ours.add(place)
        filesystem_async._results_queue = queue.Queue()  # Megatron would start a process to hold it
        with plan_folder() as folder:
            dist_checkpointing.save(
                state, str(folder), sharded_strategy=self._strategy, validate_access_integrity=not self._checked
            )
            small_files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        self._checked = True
        writer, metadata = self._strategy.planned
        files = [_planned_file(bucket, live) for bucket in writer.write_buckets]
        planned = {_part_of(item) for file in files for item, _ in file.tensors}
        assert planned == ours, f"planned otherwise than the state is: {sorted(planned ^ ours)[:5]}"
        return RankPlan(
            files=files,
            small_files=small_files,
            metadata=metadata,
        )


@contextmanager
def plan_folder() -> Iterator[Path]:
    """Make a folder of this machine for the plan of a checkpoint.

    Yields:
        The empty folder, which is removed after the block.

    Raises:
        CheckpointError: This machine has no place for it; its temporary folder may be cleaned away in a long run.
    """
    try:
        scratch = hold_new_here("dsplan")
    except OSError as error:
        raise CheckpointError(
            f"a checkpoint is put together in a small folder of this machine, and none can be made ({error}). Make "
            "room there, or name another folder in TMPDIR, then run the same command again"
        ) from error
    with scratch:
        folder = scratch.path / "plan"
        folder.mkdir()
        yield folder


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where files would be written; keeps (its writer, metadata on rank 0)."""

    planned: tuple[Any, Metadata | None]

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *version_specific: Any) -> _NothingToDo:
        self.planned = (writer, planned[1])
        return _NothingToDo()


class _NothingToDo:
    """Stands where Megatron keeps the request to write."""

    def execute_sync(self) -> None:
        """Called by Megatron in place of writing."""


def _take_data(state: Any) -> Iterator[tuple[TensorPart, torch.Tensor, bool]]:
    """Every tensor of a state dict with its place, and whether this rank writes it, being the first of those that hold
    it. A stand-in of the same shape and dtype takes its place there.
    """
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _take_data(value)
    elif isinstance(state, ShardedTensor) and state.data is not None:
        yield (state.key, tuple(state.global_offset)), state.data.detach(), is_main_replica(state.replica_id)
        state.data = torch.empty(state.data.shape, dtype=state.data.dtype, device="meta")


def _planned_file(bucket: Any, live: dict[TensorPart, torch.Tensor]) -> PlannedFile:
    _, name, (objects, stand_ins) = bucket
    return PlannedFile(
        name=name,
        objects=[(_item_of(item), _content(data)) for item, data in objects],
        tensors=[(_item_of(item), _live_tensor(item, stand_in, live)) for item, stand_in in stand_ins],
    )


def _item_of(item: WriteItem) -> Item:
    index = item.index
    return index.fqn, None if index.offset is None else list(index.offset), index.index


def _part_of(item: Item) -> TensorPart:
    key, offset, _ = item
    return key, tuple(offset or ())


def _content(data: io.BytesIO) -> bytes:
    return data.getvalue()


def _live_tensor(item: WriteItem, stand_in: torch.Tensor, live: dict[TensorPart, torch.Tensor]) -> torch.Tensor:
    tensor = live[item.index.fqn, tuple(item.index.offset or ())].view(stand_in.shape)
    assert tensor.dtype == stand_in.dtype, f"{item.index.fqn}: planned as {stand_in.dtype}, is {tensor.dtype}"
    return tensor
