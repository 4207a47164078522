"""Reading checkpoints with Megatron's distributed checkpointing."""

from __future__ import annotations

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import ChainedOptimizer

from megatron_deepstack.checkpoint.folder import Checkpoint
from megatron_deepstack.checkpoint.state import load_weights, sharded_state
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.build import RankModel


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
