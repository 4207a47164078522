"""The command line as a user runs it, for tests of what the documents say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pages import ROOT


def run(words: list[str], folder: Path) -> str:
    """What a command prints; it must succeed, and nothing that it started outlives it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_deepstack.cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{' '.join(words)}\n{said}"
    return said
