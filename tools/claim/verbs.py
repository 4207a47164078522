"""The verbs of the command line, which do all of the claim's work, with recipes written for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_deepstack.config.yaml_text import write_yaml


def write_recipe(path: Path, fields: Mapping[str, Any]) -> Path:
    """Write a recipe from fields such as `model.stacks.start`.

    Args:
        path: The YAML file; its folder is made.
        fields: Value of each field by its path.

    Returns:
        `path`.
    """
    document: dict[str, Any] = {}
    for name, value in fields.items():
        *sections, field = name.split(".")
        section = document
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(document), encoding="utf-8")
    return path


def run_verb(arguments: Sequence[str], log: Path) -> str:
    """Run one verb in a process of its own.

    Args:
        arguments: What stands after `megatron-deepstack`.
        log: File to which everything that it says is appended.

    Returns:
        What it printed to stdout.

    Raises:
        VerbError: It did not end with 0; the message ends with the last lines that it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_deepstack.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
        raise VerbError(f"{arguments[0]} ended with {done.returncode}; all that it said is in {log}:\n{said}")
    return done.stdout


class VerbError(Exception):
    """A verb failed."""
