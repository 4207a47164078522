"""Preprocessing as a user starts it: the command in a process of its own, which tests watch, signal and kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

_Result = TypeVar("_Result")

RECIPE = """\
run_dir: {folder}/run
model:
  vision: {{image_size: 28}}
  language: {{vocab_size: 512}}
data:
  records: [{folder}/records.json]
  images: {folder}/photos
  tokenizer: {folder}/tiny.model
  images_per_part: 4
  max_quarantined: 0.5
"""


@dataclass(frozen=True)
class Work:
    """A job big enough to be caught at work."""

    recipe: Path
    serial: Path
    """Its store, made by one process that nobody disturbed."""
    num_parts: int

    def command(self, store: Path | str, *options: str) -> list[str]:
        """The command line that makes its store."""
        verb = [sys.executable, "-m", "megatron_deepstack.cli", "preprocess"]
        return [*verb, str(self.recipe), f"data.store={store}", *options]

    def start(self, store: Path, *options: str) -> Command:
        """Start the command."""
        return Command(self.command(store, *options), store)


class Command:
    """A running `preprocess`. Leaving the block ends it and whatever it started."""

    def __init__(self, command: list[str], store: Path) -> None:
        self.store = store
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._descendants: dict[int, psutil.Process] = {}

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.descendants():
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def has_begun(self) -> bool:
        """It is past its checks."""
        return (self.store / "plan.json").exists()

    def records(self) -> list[str]:
        """Names of parts that have their commit record."""
        return sorted(path.stem for path in self.store.glob("parts/[a-z]*.json"))

    def writers(self) -> list[int]:
        """Ids of processes that are writing a shard; they stand in the names of temporary files."""
        found = (re.search(r"\.(\d+)\.partial$", str(path)) for path in self.store.glob("images/pixels/c/*/0/0/.*"))
        return [process for match in found if match and psutil.pid_exists(process := int(match[1]))]

    def freeze_writer(self) -> int:
        """Stop a process in the middle of a part; its id, or 0 if none was caught."""
        for process in self.writers():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                if process in self.writers():
                    return process
                os.kill(process, signal.SIGCONT)
        return 0

    def wait_for(self, condition: Callable[[], _Result]) -> _Result:
        """Until something is so, and what it is; fails if the command ends first."""
        tick = threading.Event()
        while not (result := condition()):
            assert self.process.poll() is None, f"it ended too soon: {self.process.communicate()[0]}"
            tick.wait(0.002)
        return result

    def descendants(self) -> list[psutil.Process]:
        """All processes it has been seen to have started."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._descendants |= {child.pid: child for child in children}
        return list(self._descendants.values())

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code and everything it said."""
        said, _ = self.process.communicate(timeout=240)
        return self.process.returncode, said


def assert_gone(processes: list[psutil.Process]) -> None:
    """None of the processes is left after a while."""
    assert processes, "there were none"
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not [name for process in alive if (name := name_of(process))]


def name_of(process: psutil.Process) -> str:
    """Empty if it has ended."""
    with suppress(psutil.Error):
        return "" if process.status() == psutil.STATUS_ZOMBIE else process.name()
    return ""
