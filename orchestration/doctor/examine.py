"""All that `doctor` looks at, in the order in which it is shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.platform.quantity import data_size
from orchestration.doctor.finding import Finding, State
from orchestration.doctor.host import look

LACKING_EXIT_CODE: Final = 1
DEADLINE_SECONDS: Final = 120.0
"""For one probe; importing torch from a slow network file system takes a minute."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe's process said, or how it ended."""

    facts: Mapping[str, Any] | None = None
    fault: str = ""


Run = Callable[[Sequence[str], float], Outcome]


def examine(folder: Path = Path(), deadline: float = DEADLINE_SECONDS) -> Iterator[Finding]:
    """Every finding, as soon as it is known.

    Args:
        folder: Where runs are going to lie.
        deadline: Seconds that a single probe may take.
    """
    yield from look(folder)
    yield _libraries(_probe("libraries", deadline))
    devices = _probe("torch", deadline)
    yield from _devices(devices)
    yield _required("Megatron-Core", _probe("megatron", deadline), "pip install 'megatron-core>=0.16.1,<0.20'")
    gpus = bool((devices.facts or {}).get("devices"))
    for subject, module in (("Transformer Engine", "transformer_engine"), ("Apex", "apex")):
        there = find_spec(module) is not None
        yield _optional(subject, _probe(module, deadline) if there else None, gpus=gpus)
    yield _ray(_probe("ray", deadline))


def _probe(name: str, deadline: float) -> Outcome:
    return run_probe([sys.executable, "-m", "orchestration.doctor.probe", name], deadline)


def run_probe(command: Sequence[str], deadline: float) -> Outcome:
    """Run a probe's process, which leads a group of its own, so that nothing that it has started outlives it.

    Args:
        command: The command line of the process.
        deadline: Seconds after which the process and all that it has started are killed.

    Returns:
        The facts that it printed as JSON in its last line, or the fault.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        out, said = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        _end(process)
        return Outcome(fault=f"no answer within {deadline:.0f} s")
    except BaseException:
        _end(process)
        raise
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if process.returncode < 0:
        return Outcome(fault=f"killed by {_signal_name(-process.returncode)} while {last or 'starting'}")
    try:
        return Outcome(facts=json.loads(out.splitlines()[-1]))
    except (ValueError, IndexError):
        return Outcome(fault=last or f"ended with exit code {process.returncode} and without a word")


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _libraries(outcome: Outcome) -> Finding:
    broken = (outcome.facts or {}).get("broken", {})
    if outcome.facts is not None and not broken:
        return Finding("libraries", State.GOOD, "all load")
    found = "; ".join(f"{name}: {error}" for name, error in broken.items()) or outcome.fault
    return Finding("libraries", State.LACKING, found, "install them again: make setup, in a new VENV")


def _required(subject: str, outcome: Outcome, advice: str) -> Finding:
    if outcome.facts is None:
        return Finding(subject, State.LACKING, f"does not load: {outcome.fault}", advice)
    return Finding(subject, State.GOOD, f"{outcome.facts['version']} loads")


def _optional(subject: str, outcome: Outcome | None, *, gpus: bool) -> Finding:
    """Of use on GPUs only; None: not installed."""
    how = "pip install 'megatron-deepstack[gpu]'"
    if subject == "Apex":
        how = "build it from NVIDIA's repository, or use NVIDIA's container; `pip install apex` is another project"
    if outcome is None:
        if gpus:
            return Finding(subject, State.NOTE, "not installed; steps on these GPUs are slower without it", how)
        return Finding(subject, State.GOOD, "not installed, and of no use without a GPU")
    if outcome.facts is None:
        return Finding(subject, State.NOTE, f"installed, but does not load: {outcome.fault}", f"remove it, or {how}")
    return Finding(subject, State.GOOD, f"{outcome.facts.get('version', '')} loads".strip())


def _devices(outcome: Outcome) -> Iterator[Finding]:
    if outcome.facts is None:
        yield Finding(
            "torch", State.LACKING, f"does not load: {outcome.fault}", "pip install --constraint constraints.txt torch"
        )
        return
    facts = outcome.facts
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built for the CPU"
    yield Finding("torch", State.GOOD, f"{facts['torch']}, {built}")
    if facts["devices"]:
        names = [f"{name} ({data_size(memory)})" for name, memory in facts["devices"]]
        yield Finding("GPUs", State.GOOD, ", ".join(names))
        yield _nccl(facts["nccl"])
        return
    unseen = any(Path("/dev").glob("nvidia[0-9]*"))
    if not unseen:
        yield Finding("GPUs", State.NOTE, "none; small models train on the CPU, with gloo between ranks")
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = "install a torch built for CUDA, and a driver that fits it (nvidia-smi shows the driver's CUDA)"
    if hidden is not None:
        advice = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it to use them"
    yield Finding("GPUs", State.NOTE, "the machine has some, and torch sees none", advice)


def _nccl(version: str) -> Finding:
    if version:
        return Finding("NCCL", State.GOOD, version)
    return Finding("NCCL", State.LACKING, "not in this torch", "GPUs exchange through it: install a torch with NCCL")


def _ray(outcome: Outcome) -> Finding:
    if outcome.facts is not None:
        return Finding("Ray", State.GOOD, f"{outcome.facts['version']} starts, in {outcome.facts['folder']}")
    advice = (
        "`preprocess --workers 0` and `train` work without it. Look at the load, at free memory and at the temporary "
        "folder (RAY_TMPDIR or TMPDIR names another)"
    )
    return Finding("Ray", State.NOTE, f"does not start: {outcome.fault}", advice)
