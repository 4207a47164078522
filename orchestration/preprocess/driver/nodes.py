"""A look at every node of a cluster before work begins: does it see the program, the images and the store?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import megatron_deepstack
from megatron_deepstack.data.images.source import TarMember, files_of
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import ClusterError, DeepStackError
from orchestration.preprocess.driver.lease import read_token
from orchestration.preprocess.part.parts import ImagePart, Part
from orchestration.preprocess.part.work import Job

_PROBE_SECONDS: Final = 120.0
"""Longest wait for a node's answer; a worker's start with a runtime environment takes 3 s to 20 s."""
_TRIED_IMAGES: Final = 10


@dataclass(frozen=True, slots=True)
class _Expected:
    """What every node should find."""

    version: str
    token: str
    """Of the lease in the store: seen there, it is the same folder and not one of the same name."""
    image: Location | None
    """An image's file, or the shard it lies in, that the driver sees; None if it sees none."""


def check_nodes(ray: Any, job: Job, parts: Sequence[Part], environment: Mapping[str, str]) -> None:
    """Ask every node of the cluster whether it can do the job.

    Args:
        ray: The module ray, connected to the cluster.
        job: The job.
        parts: The parts that are still to be done.
        environment: Variables for the tasks.

    Raises:
        ClusterError: Some nodes cannot do it; the message names them, each with the reason.
    """
    expected = _Expected(megatron_deepstack.__version__, read_token(job.root), _find_image(job, parts))
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            pinned = task.options(
                scheduling_strategy=strategy(node["NodeID"], soft=False), runtime_env={"env_vars": dict(environment)}
            )
            asked[pinned.remote(job, expected)] = node["NodeManagerAddress"]
    ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_SECONDS)
    problems = {name: _answer(ray, reference) for reference, name in asked.items()}
    listed = [f"{name}: {problem}" for name, problem in sorted(problems.items()) if problem]
    if listed:
        raise ClusterError(
            "\n  ".join([f"{len(listed)} of {len(asked)} nodes of the cluster cannot do this job:", *listed])
            + "\nInstall the same version everywhere, and give paths that every node sees: a shared folder, or a URL."
        )


def _find_image(job: Job, parts: Sequence[Part]) -> Location | None:
    """One that is there, among the first few."""
    first = next((part for part in parts if isinstance(part, ImagePart)), None)
    places = [job.image_at(first, path) for path in first.paths[:_TRIED_IMAGES]] if first else []
    first_files = (files_of(place)[0] for place in places)
    files = (file.shard if isinstance(file, TarMember) else file for file in first_files)
    return next((file for file in files if file.exists()), None)


def _answer(ray: Any, reference: Any) -> str:
    """What is wrong with a node; empty if nothing is. A node that has died since then does not count."""
    try:
        problem: str = ray.get(reference, timeout=0)
        return problem
    except ray.exceptions.NodeDiedError:
        return ""
    except ray.exceptions.GetTimeoutError:
        return f"no answer within {_PROBE_SECONDS:.0f} s"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]


def _look(job: Job, expected: _Expected) -> str:
    """Runs on a node: what is wrong there, in one line."""
    if megatron_deepstack.__version__ != expected.version:
        return f"has version {megatron_deepstack.__version__} of megatron-deepstack, the driver {expected.version}"
    try:
        if read_token(job.root) != expected.token:
            return f"does not see the store {job.root}"
        with _probe_file(job.root).write() as file:
            file.write(b"")
        _probe_file(job.root).delete()
    except (OSError, DeepStackError) as error:
        return f"cannot write the store {job.root}: {error}"
    try:
        if expected.image is not None and not expected.image.exists():
            return f"does not see the images: {expected.image} is not there"
    except DeepStackError as error:
        return f"cannot read the images: {error}"
    return ""


def _probe_file(root: Location) -> Location:
    return root.child(f".probe.{os.uname().nodename}.{os.getpid()}.partial")
