"""How fast the command line answers: `--help`, a mistyped verb, a bad value, the list of recipes and a plan.

Each command runs in a process of its own, once unmeasured so that files are in the page cache, then in rounds that take
all commands in turn. Measured are the CPU seconds of the process (user and system) and the seconds on the wall; the
last line is one JSON object with the median, least and greatest of both for each command. CPU seconds say how much
is imported and computed, also on a busy machine; the wall is what a person waits for. Run on an otherwise idle machine:
python tools/bench_cli.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "help": (["--help"], 0),
    "typo": (["trian", "demo"], 2),
    "bad value": (["plan", "demo", "train.steps=many"], 2),
    "recipes": (["recipes"], 0),
    "plan demo": (["plan", "demo"], 0),
}
"""Arguments and the expected exit code by name."""


def measure(name: str) -> tuple[float, float]:
    """CPU and wall seconds of one call, both from its start to its end."""
    arguments, code = COMMANDS[name]
    before, begin = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_deepstack.cli", *arguments], capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode != code:
        sys.exit(f"{name}: exit code {done.returncode}, expected {code}\n{done.stdout}{done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, wall


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and greatest of measured seconds."""
    found = {"median": statistics.median(seconds), "least": min(seconds), "greatest": max(seconds)}
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure every command, print a line for each and all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="calls of each command")
    repeats = parser.parse_args().repeats
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for number in range(repeats + 1):
        for name, rows in measured.items():
            row = measure(name)
            if number:
                rows.append(row)
    found = {}
    for name, rows in measured.items():
        cpu, wall = (spread(list(column)) for column in zip(*rows, strict=True))
        found[name] = {"cpu_seconds": cpu, "wall_seconds": wall}
        print(f"{name}: {cpu['median']:.2f} s of CPU, {wall['median']:.2f} s on the wall")
    print(json.dumps({"repeats": repeats, "commands": found}))


if __name__ == "__main__":
    main()
