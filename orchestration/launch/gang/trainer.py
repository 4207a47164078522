"""Ray Train's description of a gang. Import it after `orchestration.cluster.import_ray`, as `gang`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.train.torch import TorchTrainer

from orchestration.launch.before.placement import Demand
from orchestration.launch.gang.callback import GangCallback, MeetingConfig
from orchestration.launch.gang.rank import RankTask, run_rank
from orchestration.ray_private import FailureConfig, RunConfig, ScalingConfig


def gang_trainer(
    task: RankTask, run_dir: Path, demand: Demand, environment: Mapping[str, str], start_retry_seconds: float
) -> Any:
    """A trainer whose `fit()` runs `task` on the gang, again after failures, and returns what rank 0 returned.

    Workers that fail to start are another budget of Ray Train's: as many tries as there is time for, and the restarts.

    Args:
        task: What each rank does.
        run_dir: The run's folder.
        demand: Number of workers, and what each of them needs.
        environment: Variables for the workers.
        start_retry_seconds: Longest time of one try to start all workers.

    Returns:
        Ray Train's trainer.
    """
    launching = task.recipe.launch
    start_tries = int(launching.start_seconds // start_retry_seconds)

    def train_loop() -> Any:
        return run_rank(task)

    callbacks: Any = [GangCallback(demand, run_dir, launching.start_seconds)]
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
