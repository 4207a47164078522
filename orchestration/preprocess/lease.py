"""The lease on a store: one driver at a time writes it, on whatever machine, in a folder or in a bucket.

The lease is a small file, created only where none is, that its owner rewrites every few seconds. Locks of the file
system are not used: a bucket has none, and on shared folders they often reach only as far as one machine. A lease that
is still there is taken over
- at once, if its owner ran on this machine and its process is gone (killed, or the machine restarted);
- after `PATIENCE_SECONDS` in which it was not rewritten, if its owner is on another machine. Only changes are watched,
  so clocks need not agree.
A driver that was stopped for longer than that and wakes up finds another's lease and ends. Should two drivers
nevertheless write at once, no harm is done: they can only be of the same plan, and write the same bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.writer import json_bytes, write_error
from megatron_deepstack.errors import LocationError, StoreError
from megatron_deepstack.platform.owner import BEAT_SECONDS, PATIENCE_SECONDS, Owner, lives, this_process

LEASE_FILE: Final = ".lock"


class Lease:
    """A lease that is held."""

    def __init__(self, root: Location, owner: Owner) -> None:
        self.owner = owner
        self._root = root
        self._file = root.child(LEASE_FILE)
        self._stolen_by: Owner | None = None
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise StoreError if another driver has taken over meanwhile."""
        if self._stolen_by is not None:
            raise StoreError(
                f"{self._root}: {self._stolen_by} has taken over this store, since this process stood still for more "
                f"than {PATIENCE_SECONDS:.0f} s. What is done is kept; the other job goes on with it."
            )

    def release(self) -> None:
        """Give the lease back."""
        self._released.set()
        self._heart.join()
        with suppress(OSError, LocationError):  # whoever comes next finds that its process is gone
            if self._stolen_by is None:
                self._file.delete()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # A beat that cannot be written (full disk, bucket away) is left out: the job's own writing says so.
            with suppress(OSError, LocationError):
                found = _read(self._file)
                if found is not None and found.token != self.owner.token:
                    self._stolen_by = found
                    return
                self.owner = replace(self.owner, beat=self.owner.beat + 1)
                with self._file.write() as file:
                    file.write(json_bytes(asdict(self.owner)))


@contextmanager
def hold_lease(root: Location) -> Iterator[Lease]:
    """Hold the lease on the store in `root`, whose folder is made if need be.

    Raises StoreError, naming the holder, if a living driver holds it, or if the folder cannot be written.
    """
    try:
        lease = Lease(root, _acquire(root))
    except OSError as error:
        raise write_error(root, error) from error
    try:
        yield lease
    finally:
        lease.release()


def read_token(root: Location) -> str:
    """Token of the lease on `root`, as any node sees it; empty if there is none."""
    owner = _read(root.child(LEASE_FILE))
    return owner.token if owner else ""


def _acquire(root: Location) -> Owner:
    file = root.child(LEASE_FILE)
    me = this_process("preprocess")
    while True:
        try:
            file.create(json_bytes(asdict(me)))
        except FileExistsError:
            holder = _read(file)
            if holder == me:  # created by the first try of a request that had to be repeated
                return me
            if holder is not None and _is_alive(file, holder):
                raise StoreError(
                    f"{root}: another preprocessing job is writing this store ({holder}). "
                    "Wait for it, or stop it and run this command again."
                ) from None
            with suppress(FileNotFoundError):  # its owner has just given it back
                file.delete()
        else:
            return me


def _is_alive(file: Location, holder: Owner) -> bool:
    """Whether a lease's owner is still at work; takes up to `PATIENCE_SECONDS` if it is on another machine."""
    return lives(holder, holder, lambda: _read(file), patience_seconds=PATIENCE_SECONDS, beat_seconds=BEAT_SECONDS)


def _read(file: Location) -> Owner | None:
    """The lease in `file`; None if there is none, or none of ours."""
    try:
        return Owner(**json.loads(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
