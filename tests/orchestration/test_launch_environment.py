"""Variables of ranks: which ones they get, and that nothing which Ray shows holds a credential."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch_cases import demand, node
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.testing.tiny import tiny_recipe
from orchestration.cluster import import_ray
from orchestration.launch.before import preflight, probe
from orchestration.launch.before.placement import place
from orchestration.launch.environment import is_private, rank_environment, take
from orchestration.launch.gang import rank
from orchestration.launch.gang.rank import RankTask, run_rank
from orchestration.preprocess.driver.tasks import WORKER_ENVIRONMENT

MARK = "not-to-be-seen"
SECRETS = {
    name: f"{MARK}-{number}"
    for number, name in enumerate(
        (
            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "HF_TOKEN",
            "WANDB_API_KEY", "FSSPEC_S3", "FSSPEC_S3_SECRET", "TORCH_HUB_TOKEN", "NCCL_SOME_KEY",
        )
    )
}  # fmt: skip
PLAIN = {
    "NCCL_DEBUG": "INFO", "FI_PROVIDER": "efa", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "4",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


def test_variables_that_ranks_get() -> None:
    found = rank_environment({**PLAIN, **SECRETS, "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "RANK": "3"})
    assert found.shown == {**PLAIN, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert found.private == SECRETS


def test_neither_description_nor_error_of_what_is_sent_holds_one() -> None:
    environment = rank_environment(SECRETS)
    task = RankTask(tiny_recipe(), "/", None, environment.private)
    questions = probe.Questions(tiny_recipe(), "/", environment.private)
    assert MARK not in repr((environment, task, questions))
    assert pickle.loads(pickle.dumps(task)).environment == SECRETS


def test_ray_train_is_told_of_none_but_in_the_ranks_own_function(tmp_path: Path) -> None:
    """Ray Train records the runtime environment, the backend's settings and the loop's, and shows them all."""
    cloudpickle = import_ray(None).cloudpickle
    from orchestration.launch.gang.trainer import gang_trainer

    environment = rank_environment({**PLAIN, **SECRETS})
    task = RankTask(tiny_recipe(), "/", None, environment.private)
    trainer = gang_trainer(task, tmp_path, demand(2), environment.shown, 30.0)
    assert trainer.run_config.worker_runtime_env == {"env_vars": dict(environment.shown)}
    recorded = (trainer.run_config, trainer.train_loop_config, trainer.backend_config.to_dict(), trainer.scaling_config)
    assert MARK not in repr(recorded)
    assert MARK.encode() not in cloudpickle.dumps(recorded)
    assert MARK.encode() in cloudpickle.dumps(trainer.train_loop_per_worker)


def test_the_processes_that_check_nodes_get_them_in_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ray(None)
    asked: dict[str, Any] = {}

    def options(**found: Any) -> Any:
        asked.update(found)
        return SimpleNamespace(remote=lambda *given: given)

    ray = SimpleNamespace(remote=lambda _: SimpleNamespace(options=options))
    environment = rank_environment({**PLAIN, **SECRETS})
    here = replace(node(1), id="ab" * 28)
    given: Any = preflight._probe_on(ray, here, demand(1), place(demand(1), [here]), environment)
    assert asked["runtime_env"] == {"env_vars": dict(environment.shown)}
    assert given == ()
    monkeypatch.setattr(preflight, "gather", lambda *_: dict(os.environ))
    monkeypatch.setattr(os, "environ", {})
    seen = preflight.Probe().gather(probe.Questions(tiny_recipe(), "/", environment.private), "10.0.0.1", "t")
    assert seen == SECRETS


def test_a_rank_sets_them_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "0"})
    seen = []

    def speak(_: Path) -> None:
        seen.append(dict(os.environ))
        raise KeyboardInterrupt

    monkeypatch.setattr(rank, "speak_into", speak)
    with pytest.raises(KeyboardInterrupt):
        run_rank(RankTask(replace(tiny_recipe(), run_dir=str(tmp_path)), "/nowhere", None, SECRETS))
    assert seen == [{"RANK": "0", **SECRETS}]


def test_fsspec_reads_its_variables_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads them when it is imported, which Ray may have done in the rank's process before."""
    import fsspec.config

    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(fsspec.config.set_conf_env, "__defaults__", (os.environ,))
    take({"FSSPEC_S3": '{"key": "me"}'})
    assert fsspec.config.conf["s3"] == {"key": "me"}


def test_the_dry_run_says_that_they_are_set(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe))
    result = CliRunner().invoke(app, ["launch", str(file), "--dry-run"], env={"COLUMNS": "160", **SECRETS, **PLAIN})
    assert MARK not in result.output
    for name in SECRETS:
        assert f"{name}=(set)" in result.output
    assert "NCCL_DEBUG=INFO" in result.output


def test_preprocessing_sends_none() -> None:
    """Its workers on a cluster have their nodes' own credentials; what it sends holds memory settings alone."""
    assert not any(map(is_private, WORKER_ENVIRONMENT))
