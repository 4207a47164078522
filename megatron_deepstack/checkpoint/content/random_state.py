"""Random states of a rank in a checkpoint.

Nothing draws random numbers while training today: initialisation and the order of samples are functions of (seed,
index), and no layer drops out. The generators are saved so that a layer which does draw resumes exactly; they belong to
a rank's place, so only the same layout takes them over.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_deepstack.platform.compute.random import device_random_state, set_device_random_state

_HOST, _DEVICE, _TRACKED = "host", "device", "tracked."


def sharded_random_states() -> dict[str, ShardedTensor]:
    """This rank's generators, each a row of a tensor with one row per rank."""
    row = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"random.{name}", state[None], row) for name, state in _states().items()
    }


def set_random_states(loaded: dict[str, torch.Tensor]) -> None:
    """Put the generators where they were."""
    torch.set_rng_state(loaded[_HOST][0])
    set_device_random_state(loaded[_DEVICE][0])
    tracker = get_cuda_rng_tracker()
    restored = {name: loaded[_TRACKED + name][0] for name, state in tracker.get_states().items() if _tracked(state)}
    tracker.set_states({**tracker.get_states(), **restored})


def _states() -> dict[str, torch.Tensor]:
    states = {_HOST: torch.get_rng_state(), _DEVICE: device_random_state()}
    tracked = {_TRACKED + name: state for name, state in get_cuda_rng_tracker().get_states().items() if _tracked(state)}
    return {**states, **tracked}


def _tracked(state: object) -> bool:
    """Generators of CUDA graphs are objects and hold no state to copy."""
    return isinstance(state, torch.Tensor)
