"""The board of a node: where the ranks of one run on one machine leave their beats for each other.

It is a folder in the machine's memory (or in its temporary folder), so that beating costs no file system which nodes
share. All ranks of a run on the machine hold it, and the last one removes it; what killed ranks leave is swept by the
next run. Where no such folder can be made each rank is a node of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.platform.files.scratch import Scratch, hold, places, sweep
from megatron_deepstack.platform.processes.process import machine_start

_KIND: Final = "dsbeats"
_ATTEMPT: Final = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""Variables that tell one attempt of a run from the next, as far as its launcher sets them."""
_CALLED: Final = "called"


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    number: int
    """Counts up as long as the process runs."""
    doing: str
    """What it was last known to begin, such as `step 12`."""
    hanging: bool = False
    """The rank has found the run hanging and is about to end."""
    since: float = 0.0
    """When the rank began to beat, in seconds since 1970; tells it from the same rank of an earlier attempt."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"rank {self.rank} (pid {self.pid} on {self.host}, in {self.doing})"


class NodeBoard:
    """The board of this machine, as one rank sees it."""

    def __init__(self, run_dir: Path, rank: int, parents: Iterable[Path] | None = None) -> None:
        """Hold the board of a run.

        Args:
            run_dir: The run's folder.
            rank: This process's rank.
            parents: Folders of this machine to try; by default those of `scratch.places`.
        """
        self._rank, self._began_ns = rank, time.time_ns()
        self._own: Beat | None = None
        self._scratch = _hold(run_dir, places() if parents is None else parents)
        alone = "" if self._scratch is not None else f" rank {rank}"
        device = self._scratch.path.stat().st_dev if self._scratch is not None else 0
        digest = hashlib.sha256(f"{machine_start()} {device}{alone}".encode()).hexdigest()[:8]
        self.name = f"{socket.gethostname()}-{digest}"
        """Of this node, the same for all its ranks and for no others: containers of one machine may share its name."""

    def put(self, beat: Beat) -> None:
        """Leave this rank's beat. What cannot be written is left out."""
        self._own = beat
        if self._scratch is not None:
            partial = self._scratch.path / f".{self._rank}.partial"
            with suppress(OSError):
                _write(partial, json.dumps(asdict(beat)))
                partial.replace(self._scratch.path / str(self._rank))

    def beats(self) -> dict[int, Beat]:
        """The last beat of each rank of this node, by rank; this rank's own included."""
        found = {} if self._scratch is None else _read_all(self._scratch.path)
        return found if self._own is None else {**found, self._rank: self._own}

    def pass_on_call(self) -> None:
        """Let the other ranks of this node know that a hang was called."""
        if self._scratch is not None:
            with suppress(OSError):
                _write(self._scratch.path / _CALLED, "")

    @property
    def is_called(self) -> bool:
        """Whether a rank of this node has passed on that a hang was called, since this rank began."""
        if self._scratch is None:
            return False
        try:
            return (self._scratch.path / _CALLED).stat().st_mtime_ns > self._began_ns
        except OSError:
            return False

    def close(self) -> None:
        """Leave the board; the last one removes it."""
        if self._scratch is not None:
            self._scratch.release()
            self._scratch = None


def beat_of(raw: Mapping[str, Any]) -> Beat:
    """A beat as it was written; raises TypeError where it is none."""
    return Beat(**raw)


def _hold(run_dir: Path, parents: Iterable[Path]) -> Scratch | None:
    attempt = [os.environ.get(name, "") for name in _ATTEMPT]
    digest = hashlib.sha256(json.dumps([str(run_dir.resolve()), *attempt]).encode()).hexdigest()[:16]
    for parent in parents:
        with suppress(OSError):
            sweep(parent, _KIND)
            return hold(parent, f"{_KIND}-{digest}")
    return None


def _read_all(folder: Path) -> dict[int, Beat]:
    found = {}
    with suppress(OSError):
        for file in folder.iterdir():
            if file.name.isdecimal():
                with suppress(OSError, ValueError, TypeError):
                    found[int(file.name)] = beat_of(json.loads(file.read_text(encoding="utf-8")))
    return found


def _write(path: Path, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)
