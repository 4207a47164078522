"""The runs of the claim: each trained and asked by the command line's own verbs, and kept as one JSON file.

A run that was interrupted goes on from its checkpoint, and one whose result is there is not started again.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.check import load_checked_recipe
from megatron_deepstack.planning.exchange.rows import context_length
from tools.claim.experiment import Arm, Experiment
from tools.claim.stores import store_path
from tools.claim.verbs import VerbError, run_verb, write_recipe

_CACHED_NUMBER_BYTES = 2
"""A number of the key/value cache in bfloat16."""
_GRID = (2, 2)


@dataclass(frozen=True, slots=True)
class Job:
    """One run: an arm with a learning rate and a seed."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Arm, rate and seed as a path."""
        return f"{self.arm.folder}/lr-{self.learning_rate:g}-seed-{self.seed}"


def check_arms(experiment: Experiment) -> None:
    """Check the recipe of every arm, before any is trained.

    Raises:
        VerbError: Recipes are refused; the message names each arm with what is wrong with it.
    """
    refused = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in experiment.arms:
            recipe = write_recipe(Path(folder) / "recipe.yaml", {**experiment.base, **arm.fields})
            try:
                load_checked_recipe(recipe)
            except ConfigError as error:
                refused.append(f"arm {arm.name!r}: {error}")
    if refused:
        raise VerbError("\n".join(refused))


def run_all(
    folder: Path, experiment: Experiment, jobs: Sequence[Job], parallel: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run jobs, some at the same time.

    Args:
        folder: The claim's folder, with its stores.
        experiment: What is compared.
        jobs: The runs.
        parallel: How many run at the same time, each in one process with one thread.
        say: Called with a line when a run has ended.

    Returns:
        The result of each job, in their order.

    Raises:
        VerbError: A verb failed. No further job is started, and those that run end first.
    """
    stopped = threading.Event()

    def one(job: Job) -> dict[str, Any] | None:
        if stopped.is_set():
            return None
        try:
            return run_job(folder, experiment, job, say)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            results = [future.result() for future in futures]
        except BaseException:
            stopped.set()
            raise
    return [result for result in results if result is not None]


def run_job(folder: Path, experiment: Experiment, job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a run and ask it, or read its result if it is there.

    Args:
        folder: The claim's folder, with its stores.
        experiment: What is compared.
        job: The run.
        say: Called with a line when it has ended.

    Returns:
        Its result, as it is written to `result.json` in its folder.
    """
    run = folder / "runs" / job.name
    path = run / "result.json"
    if path.exists():
        return _read(path)
    recipe = write_recipe(
        folder / "recipes" / f"{job.name}.yaml",
        {
            **experiment.base,
            **job.arm.fields,
            "name": job.arm.folder,
            "run_dir": str(run),
            "optimizer.lr": job.learning_rate,
            "train.seed": job.seed,
            "data.tokenizer": str(folder / "data" / "tokenizer.model"),
            "data.store": str(store_path(folder, job.arm.store, "train")),
            "data.validation_store": str(store_path(folder, job.arm.store, "test")),
            "checkpoint.interval": 100,
            "checkpoint.keep": 1,
        },
    )
    log = folder / "logs" / f"{job.name}.log"
    run_verb(["train", str(recipe)], log)
    result: dict[str, Any] = {
        "arm": job.arm.name,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        **_costs(recipe, run),
        "test": _ask(folder, run, job.arm, "test", log),
    }
    if job.seed == experiment.seeds[0]:
        result["tune"] = _ask(folder, run, job.arm, "tune", log)
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(result) + "\n", encoding="utf-8")
    os.replace(begun, path)
    right = sum(answer["answer"] == answer["expected"] for answer in result["test"])
    say(f"{job.name}: {right} of {len(result['test'])} right, {result['step_seconds']:.2f} s a step")
    return result


def _ask(folder: Path, run: Path, arm: Arm, split: str, log: Path) -> list[dict[str, str]]:
    said = run_verb(["generate", str(run), "--store", str(store_path(folder, arm.store, split)), "--json"], log)
    return [
        {"kind": answer["id"].split("-")[1], "answer": answer["answer"], "expected": answer["expected"]}
        for answer in json.loads(said)["answers"]
    ]


def _costs(recipe_path: Path, run: Path) -> dict[str, float]:
    """What a sample costs: positions, operations of training, seconds of a step, bytes of the key/value cache."""
    recipe = load_recipe(str(recipe_path))
    with RunFolder(run).metrics.open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    last, language = steps[-1], recipe.model.language
    tokens = last["num_tokens"] / recipe.train.global_batch_size
    return {
        "context_length": context_length(recipe.model, _GRID),
        "tokens_per_sample": tokens,
        "training_flops_per_sample": 1e12
        * last["tflops_per_second"]
        * last["step_seconds"]
        / recipe.train.global_batch_size,
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "cache_bytes_per_sample": 2 * language.num_layers * language.hidden_size * tokens * _CACHED_NUMBER_BYTES,
    }


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
