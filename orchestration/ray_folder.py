"""Where a Ray of our own keeps its sockets and logs: a short private folder of this machine, removed afterwards.

Ray opens sockets below its temporary folder, and the kernel takes no socket path of more than 107 bytes; a batch
system's TMPDIR is easily too long. So a few places are tried, the user's own first. If none can be used, the error says
what is wrong with each.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_deepstack.errors import ClusterError
from megatron_deepstack.platform.files.scratch import MEMORY, NUMBER_DIGITS, Scratch, hold_new

_KIND: Final = "dsray"
_INNER: Final = "r"
"""Folder in ours that is handed to Ray, which opens what it is given to all users; ours stays closed to others."""
_SOCKET_BYTES: Final = 107
"""Longest path of a socket in Linux (`sun_path`, less its final zero)."""
_BELOW: Final = "/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest socket path that Ray 2.60 makes below its folder, with the largest process id of Linux."""
LONGEST: Final = _SOCKET_BYTES - len(_BELOW) - len(f"/{_KIND}-/{_INNER}") - NUMBER_DIGITS
"""Bytes of the longest folder that Ray's may be made in."""
NEEDED_BYTES: Final = 32 << 20
"""Free space to ask for. A session that trained or preprocessed left 1 to 3 MB of logs; a long one leaves more."""
_COMMON: Final = (Path("/tmp"), Path("/var/tmp"), MEMORY)
_VARIABLES: Final = ("RAY_TMPDIR", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder that may hold Ray's."""

    path: Path
    source: str
    """Where its name comes from, for messages; empty for one that every system has."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.source}={self.path}" if self.source else str(self.path)


def places(environment: Mapping[str, str]) -> tuple[Candidate, ...]:
    """The places to try, in order: the user's, then those that every system has."""
    asked = [Candidate(Path(environment[name]), name) for name in _VARIABLES if environment.get(name)]
    known = {place.path for place in asked}
    return (*asked, *(Candidate(path, "") for path in _COMMON if path not in known))


def ray_folder(environment: Mapping[str, str]) -> tuple[Scratch, tuple[str, ...]]:
    """A folder for Ray on this machine.

    Args:
        environment: The process's variables, of which RAY_TMPDIR and TMPDIR count.

    Returns:
        The folder, held until it is released, and a line on each of the user's own places that was passed over.

    Raises:
        ClusterError: No place will do; it names each, what is wrong with it, and what to set.
    """
    return choose(places(environment))


def choose(candidates: Sequence[Candidate]) -> tuple[Scratch, tuple[str, ...]]:
    """A folder in the first place that can be used. See `ray_folder`."""
    faults: list[tuple[Candidate, str]] = []
    for place in candidates:
        fault, held = _try(place.path)
        if held is not None:
            passed_over = [f"{tried.name} {wrong}; Ray's files go to {held.path}" for tried, wrong in faults]
            return held, tuple(line for (tried, _), line in zip(faults, passed_over, strict=True) if tried.source)
        faults.append((place, fault))
    listed = "".join(f"\n  {place.name} {fault}" for place, fault in faults)
    raise ClusterError(
        f"Ray needs a folder on this machine for its sockets and logs, and none of these will do:{listed}\n"
        f"Set RAY_TMPDIR to a folder that you may write, whose path has at most {LONGEST} bytes, with "
        f"{NEEDED_BYTES >> 20} MiB free. (`preprocess --workers 0` and `train` need no Ray.)"
    )


def given_to_ray(folder: Scratch) -> Path:
    """The part of a held folder that Ray gets."""
    return folder.path / _INNER


def disk_fault(folder: Path) -> str:
    """What keeps files from being written in an existing folder now; empty if nothing does."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    free = found.f_bavail * found.f_frsize
    if free < NEEDED_BYTES:
        return f"is on a full disk: {free / (1 << 20):.1f} MiB free, expected {NEEDED_BYTES >> 20} MiB"
    if found.f_files and not found.f_favail:
        return "is on a disk that takes no more files (no free inodes)"
    return ""


def _try(path: Path) -> tuple[str, Scratch | None]:
    """What is wrong with a place, or the folder held there."""
    length = len(os.fsencode(path.absolute()))
    if length > LONGEST:
        return f"is too long for Ray's sockets: {length} bytes, expected at most {LONGEST}", None
    if not path.is_dir():
        return "is not a folder" if path.exists() else "is not there", None
    fault = disk_fault(path)
    if fault:
        return fault, None
    try:
        return "", hold_new(path, _KIND)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{'is full' if full else 'cannot be written'}: {error.strerror or error}", None
