"""Reading checkpoints with Megatron's distributed checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_deepstack.checkpoint.content.random_state import set_random_states, sharded_random_states
from megatron_deepstack.checkpoint.content.state import (
    allocate_states,
    keeps_extra_states,
    load_optimizer,
    load_weights,
    sharded_state,
)
from megatron_deepstack.checkpoint.folder import Checkpoint
from megatron_deepstack.checkpoint.trust import check_contents, check_extra_states, is_extra_state
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.layers.lora import is_adapter
from megatron_deepstack.parallel.agree import phase


def load(
    checkpoint: Checkpoint,
    model: RankModel,
    optimizer: ChainedOptimizer | None,
    layout: Mapping[str, int] | None = None,
) -> None:
    """Read weights and optimizer states into a model of any layout. Collective over all ranks.

    The caller has compared identities before (`identity.require_same`).

    Args:
        checkpoint: The checkpoint to read.
        model: This rank's part of the model, changed in place.
        optimizer: Its states are read too; None for the weights only.
        layout: Ranks on each axis of this run. Random states are read if the checkpoint was written under the same.

    Raises:
        CheckpointError: Tensors do not fit, or the files hold anything but data.
    """
    if optimizer is not None:
        allocate_states(optimizer)
    state = sharded_state(model, optimizer, version=checkpoint.manifest.version)
    if checkpoint.manifest.weights_alone:
        state["model"] = {part: _held_by_weights_alone(weights) for part, weights in state["model"].items()}
    if layout is not None and checkpoint.manifest.layout == layout:
        state["random"] = sharded_random_states()
    asked = {part: list(weights) for part, weights in state["model"].items()}  # the common part could bring others
    with phase():
        check_contents(checkpoint.path)
        if keeps_extra_states(model):
            check_extra_states(checkpoint.path)
    try:
        loaded = dist_checkpointing.load(state, str(checkpoint.path))
    except (CheckpointingException, CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint.path}: cannot be read into this model: {_reason(error, checkpoint)}"
        ) from error
    load_weights(model, {part: {name: loaded["model"][part][name] for name in names} for part, names in asked.items()})
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
    if "random" in state:
        set_random_states(loaded["random"])


def _held_by_weights_alone(weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of weights alone holds. Adapters are the run's own, and FP8's history begins with it."""
    return {name: part for name, part in weights.items() if not is_adapter(name) and not is_extra_state(name)}


def _reason(error: BaseException, checkpoint: Checkpoint) -> str:
    """What Megatron says, or what PyTorch gathered from all ranks; and a likely cause."""
    said = str(error)
    if isinstance(error, CheckpointException):
        said = "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))
    if checkpoint.manifest.version >= 4:
        return said
    old = "Checkpoints of format version 1 and 2, and of version 3 where only some layers have experts,"
    return f"{said}. {old} are read by the layers that wrote them; see model.layers"
