"""Heartbeats: every rank beats every few seconds, and one file per node in the run folder tells of all its ranks.

They are files and not messages, since others must know about a rank even if the rank that it would talk to is stopped
or dead. A rank that waits in a collective still beats; one that is stopped, swapped out or gone does not. Ranks leave
their beats on their node's board, and the node's first rank writes them into its file. If that rank falls silent, the
next one writes, so that the file of a node is current as long as any of its ranks lives.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.training.guard.node_board import Beat, NodeBoard, beat_of

_SILENT_BEATS: Final = 3
"""Beats of this rank in which another of its node has not beaten once, before it no longer counts as the writer."""
_FIRST_BEATS: Final = 2
"""Beats that every rank writes itself, so that `status` and others hear of it at once."""


class Heartbeats:
    """The beats of all ranks, as one rank sees them."""

    def __init__(self, run_dir: Path, rank: int, num_ranks: int) -> None:
        """Make the folder of the nodes' files.

        Args:
            run_dir: The run folder.
            rank: This rank.
            num_ranks: Number of ranks of the run.

        Raises:
            OSError: The folder cannot be made.
        """
        self.folder, self.rank, self.num_ranks = RunFolder(run_dir).heartbeats, rank, num_ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        self.board = NodeBoard(run_dir, rank)
        self._host, self._number, self._since = socket.gethostname(), 0, time.time()
        self._heard: dict[int, tuple[int, int]] = {}
        """By rank of this node: the number of its last beat, and our beats since it came."""

    def write(self, doing: str, *, hanging: bool = False, last: bool = False) -> None:
        """Beat once.

        If the disk refuses, only this beat is lost. The next one may be written, and training goes on.

        Args:
            doing: What the rank is doing, for people.
            hanging: Whether the rank has found a hang and is about to end.
            last: Whether no other beat follows; it is then written to the node's file by this rank itself.
        """
        self._number += 1
        self.board.put(Beat(self.rank, self._host, os.getpid(), self._number, doing, hanging, self._since))
        beats = self.board.beats()
        self._listen(beats)
        if last or self.is_writer or self._number <= _FIRST_BEATS:
            partial = self.folder / f".{self.board.name}.{self.rank}.partial"
            with suppress(OSError):
                text = json.dumps([asdict(beat) for _, beat in sorted(beats.items())])
                partial.write_text(text, encoding="utf-8")
                partial.replace(self.folder / f"{self.board.name}.json")

    @property
    def is_writer(self) -> bool:
        """Whether this rank is the first one of its node that still beats."""
        return not any(rank < self.rank and waited < _SILENT_BEATS for rank, (_, waited) in self._heard.items())

    def read(self) -> dict[int, Beat]:
        """Every rank's last beat, of this node at first hand; ranks that never beat are missing."""
        found = newest([*read_beats(self.folder.parent).values(), *self.board.beats().values()])
        return {rank: beat for rank, beat in found.items() if rank < self.num_ranks}

    def close(self) -> None:
        """Leave the node's board."""
        self.board.close()

    def _listen(self, beats: dict[int, Beat]) -> None:
        for rank, beat in beats.items():
            number, waited = self._heard.get(rank, (-1, 0))
            self._heard[rank] = (beat.number, 0 if beat.number != number else waited + 1)


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """Every rank's last beat as the files of the nodes tell it, by rank. Files that we did not write are left out."""
    found: list[Beat] = []
    for file in RunFolder(run_dir).heartbeats.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            found += [beat_of(raw) for raw in json.loads(file.read_text(encoding="utf-8"))]
    return newest(found)


def newest(beats: Iterable[Beat]) -> dict[int, Beat]:
    """The last beat of each rank; a rank may have been on another node in an earlier attempt."""
    found: dict[int, Beat] = {}
    for beat in beats:
        other = found.get(beat.rank)
        if other is None or (beat.since, beat.number) >= (other.since, other.number):
            found[beat.rank] = beat
    return found


def silent_ranks(before: dict[int, Beat], after: dict[int, Beat], num_ranks: int) -> tuple[int, ...]:
    """Ranks that did not beat between two readings. Ranks that have found the hang themselves are not among them.

    Args:
        before: Last beat by rank at the first reading.
        after: Last beat by rank at the second reading.
        num_ranks: Number of ranks of the run.

    Returns:
        The ranks in ascending order.
    """
    return tuple(
        rank
        for rank in range(num_ranks)
        if rank not in after or (after[rank] == before.get(rank) and not after[rank].hanging)
    )
