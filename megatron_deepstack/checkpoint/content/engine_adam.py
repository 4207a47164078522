"""Transformer Engine's AdamW where it keeps main parameters itself, and moments in bf16 (`optimizer.moment_dtype`).

Its own methods for states give float32 copies: a save would need the memory that bf16 saves, and what is loaded into
copies is lost. Here its states are read and written where they are. Main parameters are whole float32 numbers, as
every other optimizer keeps them, so that a run may change the setting when it resumes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def keeps_main_parameters(single: MegatronOptimizer) -> bool:
    """Whether main parameters are states of the inner optimizer, whose parameters are then the model's own shards."""
    return isinstance(single, DistributedOptimizer) and bool(single.config.use_precision_aware_optimizer)


def live_states(single: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The states of this rank's range of a parameter. Not collective.

    Args:
        single: A distributed optimizer with its states allocated.
        parameter: One of the model's parameters of which this rank has a range.

    Returns:
        The flat tensors that the optimizer itself uses: `exp_avg`, `exp_avg_sq` and, as `param`, main parameters.
    """
    if not keeps_main_parameters(single):
        found: dict[str, torch.Tensor] = single._get_main_param_and_optimizer_states(parameter)
        return found
    group, order = single.model_param_group_index_map[parameter]
    states = dict(single.optimizer.state[single.optimizer.param_groups[group]["params"][order]])
    states["param"] = states.pop("master_param")
    return states


def allocate(single: DistributedOptimizer) -> None:
    """Make the states that the optimizer otherwise has from its first update on: moments of zero, main parameters as
    the model's are. Not collective.

    Args:
        single: A distributed optimizer that keeps main parameters; changed in place.
    """
    inner = single.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.initialize_state(parameter, False)


def common_state(single: DistributedOptimizer) -> dict[str, Any]:
    """What Megatron keeps of an optimizer besides its tensors. Not collective.

    Args:
        single: A distributed optimizer.

    Returns:
        Its `state_dict`, without a copy of any tensor.
    """
    if not keeps_main_parameters(single):
        found: dict[str, Any] = single.state_dict()
        return found
    inner = single.optimizer
    states, inner.state = inner.state, defaultdict(dict)
    try:
        return dict(single.state_dict())
    finally:
        inner.state = states


def set_updates(single: DistributedOptimizer, updates: int) -> None:
    """Set the number of updates that were done, which Transformer Engine keeps in its groups.

    Args:
        single: A distributed optimizer that keeps main parameters; changed in place.
        updates: From a checkpoint.
    """
    for group in single.optimizer.param_groups:
        group["step"] = updates
