"""Writing and reading checkpoints with Megatron's distributed checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import ChainedOptimizer

from megatron_deepstack.checkpoint.folder import Checkpoint, checkpoint_path, commit, partial_path, prune
from megatron_deepstack.checkpoint.state import load_weights, sharded_state
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.build import RankModel


def save(
    run_dir: str | Path,
    step: int,
    model: RankModel,
    optimizer: ChainedOptimizer,
    facts: Mapping[str, Any],
    recipe_text: str,
    keep: int,
) -> Path:
    """Write the checkpoint after `step` steps and return its folder. Collective over all ranks; the folder is shared.

    Starts worker processes, so a main script needs its `__main__` guard. The newest `keep` checkpoints stay.
    """
    final = checkpoint_path(run_dir, step)
    partial = partial_path(final)
    if dist.get_rank() == 0:
        partial.mkdir(parents=True, exist_ok=True)
        for leftover in partial.iterdir():
            leftover.unlink()
    dist.barrier()
    dist_checkpointing.save(sharded_state(model, optimizer, loading=False), str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        commit(final, step, facts)
        prune(run_dir, keep)
    dist.barrier()
    return final


def load(checkpoint: Checkpoint, model: RankModel, optimizer: ChainedOptimizer | None) -> None:
    """Read weights, and with `optimizer` its states, in any layout. Collective over all ranks.

    The caller has compared identities (`identity.require_same`). Raises CheckpointError if tensors do not fit.
    """
    state = sharded_state(model, optimizer, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(checkpoint.path))
    except CheckpointingException as error:
        raise CheckpointError(f"{checkpoint.path}: does not fit this model: {error}") from error
    load_weights(model, loaded)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
