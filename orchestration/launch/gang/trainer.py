"""Ray Train's description of a gang. Import it after `orchestration.cluster.import_ray`, as `gang`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

from orchestration.launch.before.placement import Demand
from orchestration.launch.gang.callback import Gang, MeetingConfig
from orchestration.launch.gang.rank import Job, run_rank


def gang_trainer(
    job: Job, run_dir: Path, demand: Demand, environment: Mapping[str, str], start_retry_seconds: float
) -> Any:
    """A trainer whose `fit()` runs `job` on the gang, again after failures, and returns what rank 0 returned.

    Workers that fail to start are another budget of Ray Train's: as many tries as there is time for, and the restarts.
    """
    launching = job.recipe.launch
    start_tries = int(launching.start_seconds // start_retry_seconds)

    def train_loop() -> Any:
        return run_rank(job)

    callbacks: Any = [Gang(demand, run_dir, launching.start_seconds)]
    run_config: Any = RunConfig(
        name="launch",
        storage_path=str(Path(launching.storage).absolute() if launching.storage else run_dir / "ray"),
        failure_config=FailureConfig(
            max_failures=launching.max_failures,
            controller_failure_limit=start_tries + launching.max_failures,
        ),
        callbacks=callbacks,
        worker_runtime_env={"env_vars": dict(environment)},
    )
    return TorchTrainer(
        train_loop,
        torch_config=MeetingConfig(),
        scaling_config=ScalingConfig(
            num_workers=demand.num_ranks,
            use_gpu=demand.uses_gpus,
            resources_per_worker=dict(demand.resources),
            label_selector=[{} for _ in range(demand.num_ranks)],  # filled in by the gang at each start
        ),
        run_config=run_config,
    )
