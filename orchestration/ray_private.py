"""Every name that this project takes from Ray without Ray calling it public, and why: what to look at on an upgrade.

Take a name with `from orchestration.ray_private import ControllerCallback`; it is looked up in Ray at that moment, so
that the settings which Ray reads at its own import come first (see `cluster.import_ray`), and preprocessing need not
import Ray Train. `tests/orchestration/test_ray_private.py` looks all of them up.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Final

_TRAIN: Final = "ray.train.v2._internal"
_STATES: Final = f"{_TRAIN}.execution.controller.state"
_GROUP: Final = f"{_TRAIN}.execution.worker_group"


@dataclass(frozen=True, slots=True)
class Taken:
    """Where a name is in Ray 2.60, and what it is for."""

    module: str
    name: str
    """Empty: the module itself."""
    why: str


NAMES: Final = {
    "services": Taken("ray._private.services", "", "to keep a Ray of our own on the loopback interface"),
    "available_resources_per_node": Taken(
        "ray._private.state",
        "available_resources_per_node",
        "what is free on each node; public calls give the sum over all",
    ),
    "cluster_state": Taken("ray._private.state", "state", "its `get_draining_nodes`: nodes that are being taken back"),
    "worker": Taken("ray._private.worker", "", "its `_global_node`: the folder in which a Ray of our own works"),
    "FailureConfig": Taken("ray.train.v2.api.config", "FailureConfig", "v2's, whatever RAY_TRAIN_V2_ENABLED says"),
    "RunConfig": Taken("ray.train.v2.api.config", "RunConfig", "v2's, whatever RAY_TRAIN_V2_ENABLED says"),
    "ScalingConfig": Taken("ray.train.v2.api.config", "ScalingConfig", "v2's, whatever RAY_TRAIN_V2_ENABLED says"),
    "ControllerCallback": Taken(
        f"{_TRAIN}.execution.callback", "ControllerCallback", "to hear of failures before they are retried"
    ),
    "WorkerGroupCallback": Taken(
        f"{_TRAIN}.execution.callback", "WorkerGroupCallback", "to pin each rank to its node before a gang starts"
    ),
    "WorkerHealthCheckFailedError": Taken(
        f"{_TRAIN}.exceptions", "WorkerHealthCheckFailedError", "how the death of a worker process is told"
    ),
    "WorkerHealthCheckTimeoutError": Taken(
        f"{_TRAIN}.exceptions", "WorkerHealthCheckTimeoutError", "how a worker that does not answer is told"
    ),
}
"""Names by what `from orchestration.ray_private import ...` calls them."""

MEMBERS: Final = {
    "ray:init": ("_node_ip_address", "_temp_dir"),
    "ray._private.worker:_global_node": (),
    "ray._private.node:Node": ("get_session_dir_path",),
    "ray._private.services:resolve_ip_for_localhost": (),
    "ray._private.state:state": ("get_draining_nodes",),
    f"{_STATES}:RunningState": (),
    f"{_STATES}:RestartingState": ("training_failed_error",),
    f"{_STATES}:ReschedulingState": ("training_failed_error",),
    f"{_STATES}:PreemptingState": ("preemption_info",),
    f"{_GROUP}.worker:Worker": ("actor", "metadata", "distributed_context", "execute_async"),
    f"{_GROUP}.worker:ActorMetadata": ("hostname", "node_ip", "pid"),
    f"{_GROUP}.worker:RayTrainWorker": ("poll_status",),
    f"{_GROUP}.state:WorkerGroupContext": ("label_selector",),
    f"{_GROUP}.execution_group:ExecutionGroup": ("get_workers", "execute_single"),
    f"{_TRAIN}.exceptions:WorkerHealthCheckFailedError": ("health_check_failure",),
    f"{_TRAIN}.execution.callback:ControllerCallback": ("after_controller_state_update",),
    f"{_TRAIN}.execution.callback:WorkerGroupCallback": ("before_worker_group_start", "after_worker_group_start"),
}
"""Parameters, fields and methods that we use of objects which Ray hands us, or of names above, by `module:name`."""


def __getattr__(name: str) -> Any:
    """A name of `NAMES`, from Ray."""
    taken = NAMES.get(name)
    if taken is None:
        raise AttributeError(f"{__name__} takes no name {name!r} from Ray")
    try:
        module = importlib.import_module(taken.module)
        return getattr(module, taken.name) if taken.name else module
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"this Ray has no {taken.module}.{taken.name} ({taken.why}); setup.py names the Ray that was tried"
        ) from error
