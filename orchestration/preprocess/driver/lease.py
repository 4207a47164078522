"""The lease on a store: one driver at a time writes it, on whatever machine, in a folder or in a bucket.

The lease is a small file, created only where none is, that its owner rewrites every few seconds. Locks of the file
system are not used: a bucket has none, and on shared folders they often reach only as far as one machine. A lease that
is still there is taken over
- at once, if its owner ran on this machine and its process is gone (killed, or the machine restarted);
- after `PATIENCE_SECONDS` in which it was not rewritten, if its owner is on another machine. Only changes are watched,
  so clocks need not agree.
Of several drivers that find the same lease left behind one takes it over: the one that creates the claim on it, a file
named after that lease. The others find a living holder then.
A driver that was stopped for longer than that and wakes up finds another's lease and ends. Should two drivers
nevertheless write at once, no harm is done: they can only be of the same plan, and write the same bytes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.writer import json_bytes, write_error
from megatron_deepstack.errors import LocationError, StoreError
from megatron_deepstack.platform.processes.owner import (
    BEAT_SECONDS,
    PATIENCE_SECONDS,
    Owner,
    lives,
    owner_in,
    this_process,
)

LEASE_FILE: Final = ".lock"
_CLAIM: Final = f"{LEASE_FILE}.after."
"""Begins the name of a claim on a lease that was left behind; the lease's token ends it."""
_CLAIM_SECONDS: Final = 0.1
"""Wait before another look at a lease that somebody else is taking over."""


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
                f"{self._root}: {self._stolen_by} has taken over this store. Either this process could not renew its "
                f"lease for more than {PATIENCE_SECONDS:.0f} s (it was stopped, or the store did not answer), or "
                f"{self._file} was removed by hand. What is done is kept; the other job goes on with it."
            )

    def release(self) -> None:
        """Give the lease back."""
        self._released.set()
        self._heart.join()
        with suppress(OSError, LocationError):  # whoever comes next finds that its process is gone
            if self._stolen_by is None:
                found = self._file.read_bytes()
                owner = owner_in(found)
                if owner is not None and owner.token == self.owner.token:
                    _replace(self._root, found, self.owner, None)

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
                    file.write(_bytes(self.owner))


@contextmanager
def hold_lease(root: Location) -> Iterator[Lease]:
    """Hold the lease on the store in `root`, whose folder is made if it is missing.

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
            file.create(_bytes(me))
            return me
        except FileExistsError:
            found = _content(file)
        if found is None:  # given back a moment ago
            continue
        holder = owner_in(found)
        if holder == me:  # created by the first try of a request that had to be repeated
            return me
        if holder is not None and _is_alive(file, holder):
            raise StoreError(
                f"{root}: another preprocessing job is writing this store ({holder}). "
                "Wait for it, or stop it and run this command again."
            )
        if _replace(root, found, me, _bytes(me)):
            return me


def _replace(root: Location, left: bytes, me: Owner, new: bytes | None) -> bool:
    """Put `new`, or nothing, in the place of the lease `left`; False if somebody else has changed it before.

    A claim whose claimant is gone too has a claim on it in turn, and so on; the last claimant acts for all.
    """
    file, gone = root.child(LEASE_FILE), left
    claims: list[Location] = []
    while True:
        claims.append(root.child(_CLAIM + _name(gone)))
        try:
            claims[-1].create(_bytes(me))
            break
        except FileExistsError:
            found = _content(claims[-1])
        claimant = None if found is None else owner_in(found)
        if claimant is not None and claimant.token == me.token:
            break
        if found is None or (claimant is not None and _is_alive(claims[-1], claimant)):
            time.sleep(_CLAIM_SECONDS)
            return False
        gone = found
    try:
        if _content(file) != left:
            return False
        if new is None:
            file.delete()
        else:
            with file.write() as stream:
                stream.write(new)
        return True
    finally:
        for claim in reversed(claims):
            with suppress(FileNotFoundError):
                claim.delete()


def _is_alive(file: Location, holder: Owner) -> bool:
    """Whether a lease's owner is still at work; takes up to `PATIENCE_SECONDS` if it is on another machine."""
    return lives(holder, holder, lambda: _read(file), patience_seconds=PATIENCE_SECONDS, beat_seconds=BEAT_SECONDS)


def _read(file: Location) -> Owner | None:
    """The lease in `file`; None if there is none, or none of ours."""
    found = _content(file)
    return None if found is None else owner_in(found)


def _content(file: Location) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _bytes(owner: Owner) -> bytes:
    return json_bytes(asdict(owner))


def _name(content: bytes) -> str:
    """The name of a lease, for the claim on it; a file that is no lease gets a name of the same kind."""
    owner = owner_in(content)
    token = "" if owner is None else owner.token
    return token if token.isalnum() else hashlib.sha256(content).hexdigest()[:32]
