"""The files that start runs elsewhere: they parse, agree with themselves, and ask for what our command line offers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml
from waiting import wait_until

from megatron_deepstack.cli import app
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ClusterError
from megatron_deepstack.planning.check import check_world, load_checked_recipe
from orchestration import manifests
from orchestration.launch.before.placement import Node, demand_of, place

FOLDER = Path(str(manifests.__file__)).parent
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.s*h"))
KUBERNETES = sorted(path.name for path in FOLDER.glob("*.yaml"))
EVERY = ["rayjob.yaml", "ray_job_submit.sh", "slurm_ray.sbatch", "slurm_torchrun.sbatch"]
GPUS_PER_NODE, NODES = 8, 2
KUBERAY = [sys.executable, "-m", "orchestration.manifests.kuberay"]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    document = yaml.safe_load(read(name))
    assert isinstance(document, dict)
    return document


def our_commands(name: str) -> list[list[str]]:
    """Arguments of every call of ours in a file, shell variables as they stand."""
    text = load(name)["spec"]["entrypoint"] if name == "rayjob.yaml" else read(name)
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        call = re.search(r"(?:megatron-deepstack|-m megatron_deepstack\.cli) (?!.*\|\|)(.+)", line)
        if call and not line.lstrip().startswith("#"):
            found.append(shlex.split(call.group(1).rstrip("&").strip()))
    return found


def recipe_of(arguments: list[str]) -> Recipe:
    """The recipe of a call, its shell variable replaced as the shell does."""
    verb_arguments = [
        one.replace("$RUN_DIR", "/shared/run")
        for one in arguments[1:]
        if not one.startswith("--") and ":$PORT" not in one
    ]
    return load_checked_recipe(verb_arguments[0], verb_arguments[1:])


def test_all_files_are_known() -> None:
    assert sorted([*KUBERNETES, *SCRIPTS]) == sorted([*EVERY, "raycluster.yaml"])


@pytest.mark.parametrize("name", EVERY)
def test_commands_are_ours(name: str) -> None:
    """Verb and options exist, the recipe with its overrides is sound, and ranks fill the nodes that are asked for."""
    group = typer.main.get_command(app)
    (arguments,) = our_commands(name)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {one for one in arguments if one.startswith("--")} <= options
    recipe = recipe_of(arguments)
    ranks = recipe.launch.ranks if arguments[0] == "launch" else NODES * GPUS_PER_NODE
    assert ranks == NODES * GPUS_PER_NODE
    check_world(recipe, ranks)
    nodes = [Node(str(n), f"10.0.0.{n}", f"n{n}", GPUS_PER_NODE, 72) for n in range(NODES)]
    demand = demand_of(recipe, nodes, ranks)
    assert demand.uses_gpus
    seats = place(demand, nodes)
    assert all(seat.node is nodes[seat.place.pp] for seat in seats), "one pipeline stage a node"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n", FOLDER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["slurm_ray.sbatch", "slurm_torchrun.sbatch"])
def test_slurm_directives(name: str) -> None:
    lines = read(name).splitlines()
    directives = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert int(directives["nodes"]) == NODES
    assert int(directives["gpus-per-node"]) == GPUS_PER_NODE
    assert directives["ntasks-per-node"] == "1"
    assert re.fullmatch(r"(B:)?TERM@\d+", directives["signal"])
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last_directive = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_directive < first_command, "Slurm reads directives up to the first command only"


def test_ray_on_slurm_is_not_open_to_others() -> None:
    text = read("slurm_ray.sbatch")
    assert "export RAY_AUTH_MODE=token" in text
    assert "--include-dashboard=false" in text
    assert text.index("export RAY_AUTH_TOKEN") < text.index("ray start")


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_resources(name: str) -> None:
    document = load(name)
    assert document["apiVersion"] == "ray.io/v1"
    cluster = document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == NODES
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    for pod in (head["template"]["spec"], workers["template"]["spec"]):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == GPUS_PER_NODE
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_kubernetes_job_asks_for_what_its_pods_have() -> None:
    (arguments,) = our_commands("rayjob.yaml")
    recipe = recipe_of(arguments)
    (workers,) = load("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert recipe.launch.ranks == workers["replicas"] * int(limits["nvidia.com/gpu"])
    assert recipe.launch.cpus_per_rank * GPUS_PER_NODE <= int(limits["cpu"])
    assert recipe.run_dir.startswith("/shared/")


def test_the_kubernetes_job_is_started_as_it_is_written() -> None:
    """KubeRay puts the entrypoint into a shell's line, `ray job submit` quotes it anew, Ray gives it to a shell."""
    entrypoint = load("rayjob.yaml")["spec"]["entrypoint"]
    words = entrypoint.split()
    assert words[:5] == ["python", "-m", "orchestration.manifests.kuberay", "megatron-deepstack", "launch"]
    assert shlex.split(subprocess.list2cmdline(shlex.split(entrypoint))) == words
    assert not set("$`;&|\\!*?<>") & set(entrypoint)


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [("exit 0", 0, ""), ("exit 75", 0, "launch left with 75: it was asked to stop"),
     ("exit 2", 0, "left with 2: the recipe is wrong"), ("exit 3", 0, "3: the data"), ("exit 4", 0, "4: a store"),
     ("exit 5", 0, "5: a checkpoint"), ("exit 8", 0, "8: training went wrong"), ("exit 1", 1, ""), ("exit 7", 7, ""),
     ("exit 9", 9, ""), ("exit 10", 10, ""), ("exit 11", 11, ""), ("kill -9 $$", 137, "")],
)  # fmt: skip
def test_the_kubernetes_job_is_started_again_only_where_that_may_help(ends: str, code: int, words: str) -> None:
    done = subprocess.run([*KUBERAY, "bash", "-c", ends], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    assert (words in done.stdout) if words else not done.stdout
    assert ("and is not started again" in done.stdout) == bool(words)


def test_the_kubernetes_job_waits_for_a_run_that_is_told_to_stop() -> None:
    """Ray signals all processes of a job; the run still saves, and its end is the job's."""
    saves = "trap 'sleep 0.5; exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    with subprocess.Popen([*KUBERAY, "bash", "-c", saves], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        for process in (job, *psutil.Process(job.pid).children()):
            process.send_signal(signal.SIGTERM)
        assert "launch left with 75" in job.stdout.read()
    assert job.returncode == 0


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": (
        'echo "ray $*" >> "$LOG"; if [ "$1" = start ]; then [ "$HEAD_IS" = dead ] && exit 3; exec sleep 60; fi; '
        '[ -z "$HEAD_IS" ] || { echo "nothing listens"; exit 1; }'
    ),
    "megatron-deepstack": (
        'echo "ours $*" >> "$LOG"; if [ "$1" = stop ]; then touch "$LOG.stop"; exit 0; fi; '
        'while [ "$(grep -c "ray start" "$LOG")" -lt 2 ]; do sleep 0.05; done; '
        'if [ -n "$QUICK" ]; then exit "$QUICK"; fi; while [ ! -e "$LOG.stop" ]; do sleep 0.1; done; exit 75'
    ),
}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm, Ray and we are scripts that write down how they are called."""
    for name, body in STUBS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "QUICK": "", "HEAD_IS": ""}
    path_variable = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path_variable, "LOG": str(tmp_path / "log"), "RUN_DIR": "/shared/run"}


def start(stubs: dict[str, str], errors: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", FOLDER / "slurm_ray.sbatch"], env=stubs, start_new_session=True, stderr=errors)


def calls(stubs: dict[str, str]) -> str:
    log = Path(stubs["LOG"])
    return log.read_text() if log.exists() else ""


def end(script: subprocess.Popen[bytes]) -> int:
    code = script.wait(200)
    with suppress(ProcessLookupError):
        os.killpg(script.pid, signal.SIGKILL)  # the stubs of `ray start`, which Slurm would end
    return code


def test_slurm_script_hands_on_the_end_of_the_run(stubs: dict[str, str]) -> None:
    assert end(start({**stubs, "QUICK": "5"})) == 5
    said = calls(stubs)
    assert "ray start --head --block --node-ip-address=10.0.0.1 --port=6379" in said
    assert "ray start --block --address=10.0.0.1:6379" in said
    assert "ours launch deepstack_l_7b_finetune --address 10.0.0.1:6379 run_dir=/shared/run" in said
    assert "scontrol requeue" not in said


@pytest.mark.parametrize(
    ("head", "words"),
    [("dead", "slurm_ray: 'ray start' on n1 ended with 3, as said above; set RAY_PORT if port 6379 is taken there"),
     ("mute", "slurm_ray: no Ray answers at 10.0.0.1:6379 after 1 s (HEAD_SECONDS): nothing listens")],
)  # fmt: skip
def test_slurm_script_gives_up_on_a_head_that_does_not_come(stubs: dict[str, str], head: str, words: str) -> None:
    """It would otherwise wait in silence for as long as the nodes are allotted."""
    script = start({**stubs, "HEAD_IS": head, "HEAD_SECONDS": "600" if head == "dead" else "1"}, subprocess.PIPE)
    assert script.stderr is not None
    with script.stderr:
        said = script.stderr.readline().decode()
        code = end(script)
    assert code == ClusterError.exit_code
    assert said == f"{words}\n"
    assert "ours launch" not in calls(stubs)


def test_slurm_script_stops_the_run_and_goes_back_into_the_queue(stubs: dict[str, str]) -> None:
    """SIGTERM before the time is over: the run is asked to save, the code of `launch` is kept, the job requeued."""
    script = start(stubs)
    wait_until(lambda: "ours launch" in calls(stubs), lambda: calls(stubs))
    script.send_signal(signal.SIGTERM)
    assert end(script) == 75
    said = calls(stubs)
    assert "ours stop /shared/run --wait 240" in said
    assert "scontrol requeue 7" in said
