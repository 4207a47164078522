"""Runs the parts of the trial: each in a process of its own, with its own deadline, results on disk after each.

A part that raises, dies or takes too long costs its own rows: one of them says how it ended and what it printed last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Final, TextIO

from megatron_deepstack.platform.files.strict_json import to_line
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.testing.gpu.catalogue import PARTS, TOTAL_SECONDS, Part
from megatron_deepstack.testing.gpu.report import Row, Settings, Verdict, read_rows
from megatron_deepstack.testing.gpu.table import markdown, table_line

Say = Callable[[str], None]

RESULTS, TABLE, LOG = "results.json", "table.md", "log.txt"
_POLL_SECONDS: Final = 0.2
_LEAST_SECONDS: Final = 5
"""With less time left, a part is not started."""
_TINY_PATIENCE: Final = 4
"""So much longer may a part take at the size for a CPU, which may be busy, and costs no rented minutes."""
_LAST_LINES: Final = 12
_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore::UserWarning",
}


class Trial:
    """A trial in progress."""

    def __init__(self, settings: Settings, say: Say, total_seconds: float = TOTAL_SECONDS) -> None:
        """`say` prints a line of the table."""
        self.settings, self.say = settings, say
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        """How long each part took."""
        self._end = time.monotonic() + total_seconds
        self._running: dict[str, _Running] = {}

    def run(self, parts: Sequence[Part] = PARTS) -> None:
        """Run the parts in order. What they report is said, and written to the output folder, as it comes."""
        with self._no_process_left():
            for part in (one for one in parts if one.on_cpu):
                self._start(part)
            for part in (one for one in parts if not one.on_cpu):
                for name in [name for name in part.needs if name in self._running]:
                    self._follow(name)
                self._start(part)
                self._follow(part.name)
            for name in list(self._running):
                self._follow(name)
        write_whole(self.settings.output / TABLE, markdown(self.rows, self.seconds))

    def _start(self, part: Part) -> None:
        left = self._end - time.monotonic()
        if left < _LEAST_SECONDS:
            self._take([Row(part=part.name, what=part.title, verdict=Verdict.LEFT_OUT, note="no time was left")])
        else:
            patience = _TINY_PATIENCE if self.settings.tiny else 1
            self._running[part.name] = _Running(part, self.settings, min(patience * part.seconds, left))

    def _follow(self, name: str) -> None:
        """Wait for a part, and take its rows as they come."""
        running = self._running.get(name)
        if running is None:
            return
        while running.is_alive():
            self._take(running.new_rows())
            time.sleep(_POLL_SECONDS)
        self._take(running.new_rows())
        del self._running[name]
        ending = running.ending()
        self._take([] if ending is None else [ending])
        self.seconds[name] = time.monotonic() - running.begun
        with (self.settings.output / LOG).open("a", encoding="utf-8") as log:
            log.write(f"=== {name}\n{running.printed()}\n")
        self._write()

    def _take(self, rows: list[Row]) -> None:
        self.rows += rows
        for row in rows:
            self.say(table_line(row))

    def _write(self) -> None:
        document: dict[str, Any] = {
            "tiny": self.settings.tiny,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "rows": [json.loads(to_line(asdict(row))) for row in self.rows],
        }
        write_whole(self.settings.output / RESULTS, json.dumps(document, indent=1) + "\n")

    @contextmanager
    def _no_process_left(self) -> Iterator[None]:
        try:
            yield
        finally:
            for running in self._running.values():
                running.kill()


class _Running:
    """The process of a part, with all processes that it starts itself."""

    def __init__(self, part: Part, settings: Settings, seconds: float) -> None:
        self.part, self.begun = part, time.monotonic()
        self._seconds, self._late, self._num_rows = seconds, False, 0
        self._rows = settings.work / f"{part.name}.jsonl"
        self.log = settings.work / f"{part.name}.log"
        with self.log.open("w", encoding="utf-8") as log:
            self._process = self._spawn(settings, log)

    def _spawn(self, settings: Settings, log: TextIO) -> subprocess.Popen[bytes]:
        arguments = [self.part.name, self._rows, settings.work, settings.output, "tiny" if settings.tiny else "full"]
        environment = {**os.environ, **_ENVIRONMENT}
        if self.part.on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_deepstack.testing.gpu.process", *map(str, (os.getpid(), *arguments))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def is_alive(self) -> bool:
        """Whether it still runs; past its deadline it is killed."""
        if self._process.poll() is None and time.monotonic() - self.begun > self._seconds:
            self._late = True
            self.kill()
        return self._process.poll() is None

    def new_rows(self) -> list[Row]:
        """Rows that it has reported since the last call."""
        rows = read_rows(self._rows)[self._num_rows :]
        self._num_rows += len(rows)
        return rows

    def ending(self) -> Row | None:
        """A row about a bad end; None after a good one. Call when it has ended."""
        self.kill()  # what it started may have outlived it
        code = self._process.returncode
        if code == 0:
            return None
        how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        if self._late:
            how = f"not done after {self._seconds:.0f} s, and ended"
        printed = self.printed().splitlines()
        last = printed[-1] if printed and not self._late else ""
        return Row(
            part=self.part.name,
            what=self.part.title,
            verdict=Verdict.FAILED,
            note="; ".join(filter(None, (how, last)))[:300],
            traceback=tuple(printed[-_LAST_LINES:]),
        )

    def printed(self) -> str:
        """All that it and what it started have printed."""
        return self.log.read_bytes().decode(errors="replace")

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
