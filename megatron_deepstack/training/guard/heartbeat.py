"""Heartbeats: a small file per rank in the run folder, rewritten every few seconds by a thread of the rank.

Files and not messages, since a rank must be heard of when the one it would talk to is stopped or dead. A rank that
waits in a collective still beats; one that is stopped, swapped out or gone does not.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_deepstack.config.run_folder import RunFolder


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

    @property
    def place(self) -> str:
        """For messages."""
        return f"rank {self.rank} (pid {self.pid} on {self.host}, in {self.doing})"


class Heartbeats:
    """The folder of all ranks' beats, as one rank sees it."""

    def __init__(self, run_dir: Path, rank: int, num_ranks: int) -> None:
        self.folder, self.rank, self.num_ranks = RunFolder(run_dir).heartbeats, rank, num_ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        self._host, self._number = socket.gethostname(), 0

    def write(self, doing: str, *, hanging: bool = False) -> None:
        """Beat once. A disk that refuses costs this beat alone: the next one may get through, and training goes on."""
        self._number += 1
        beat = Beat(self.rank, self._host, os.getpid(), self._number, doing, hanging)
        partial = self._file(self.rank).with_suffix(".partial")
        with suppress(OSError):
            partial.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            partial.replace(self._file(self.rank))

    def read(self) -> dict[int, Beat]:
        """Every rank's last beat; ranks that never beat are missing."""
        found = (read_beat(self._file(rank)) for rank in range(self.num_ranks))
        return {beat.rank: beat for beat in found if beat is not None}

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def read_beat(file: Path) -> Beat | None:
    """A beat from its file; None where there is none, or none of this format."""
    try:
        return Beat(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def silent_ranks(before: dict[int, Beat], after: dict[int, Beat], num_ranks: int) -> tuple[int, ...]:
    """Ranks that did not beat between two readings, but for those that had found the hang and left."""
    return tuple(
        rank
        for rank in range(num_ranks)
        if rank not in after or (after[rank] == before.get(rank) and not after[rank].hanging)
    )
