"""Images to views in a separate process, which may crash or hang without harm.

The process works through a list of images, at most one image ahead of its reader: it writes the views of an image into
shared memory, and makes those of the next image while the reader takes the first ones out. If the process dies over an
image, or needs too long, the image is tried once more in a new process, and then quarantined; the rest of the list goes
on. So a killed process changes no byte of a store, and neither the driver of a job nor a worker of Ray ever runs a
decoder itself.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Final

from megatron_deepstack import errors
from megatron_deepstack.data.images.decoder_process import SLOTS, ViewSlots, Word, memory_bytes
from megatron_deepstack.data.images.image_processor import ProcessedImage
from megatron_deepstack.data.images.processors import AnyProcessor
from megatron_deepstack.data.images.source import ImageAt, QuarantineError, is_local
from megatron_deepstack.errors import DataError, LocationError

_CODE: Final = "from megatron_deepstack.data.images.decoder_process import main; main()"
_START_SECONDS: Final = 300.0
"""Longest wait until the process is ready: usually a second, but more if a busy file system holds its packages."""
_END_SECONDS: Final = 5.0
"""Longest wait until a killed process has ended; one that waits for a dead file system does not end."""
_LONGEST_POLL: Final = 2**31 - 1
"""Milliseconds (24 days); the system call accepts no more."""
_TRIES: Final = 2
"""There is a second try because the image may not be the reason why the process died or stopped."""
DECODER_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    # Without this, buffers of 1 MB are mapped again for each image. Keeping them makes a part 1.3 to 1.5 times faster.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Environment of the process; variables that the user has set take precedence."""


@dataclass(frozen=True, slots=True)
class SharedImage(ProcessedImage):
    """An image whose views lie in memory shared with the decoder process."""

    crc32c: list[int]
    """One checksum for each slot."""


class Decoder:
    """Reads and decodes images in a process that starts when it is needed, and ends with this object."""

    def __init__(self, processor: AnyProcessor, max_image_seconds: float) -> None:
        self._processor = processor
        self._seconds = max_image_seconds
        self._running: list[_Process] = []
        """It holds no process or one."""
        weakref.finalize(self, _end_all, self._running)

    def decode(self, images: Sequence[ImageAt]) -> Generator[SharedImage | QuarantineError, None, None]:
        """Decode images in order.

        Args:
            images: Where the images are.

        Yields:
            For each image its views, valid until the next image is asked for, or the reason why it has none.

        Raises:
            DataError: The machine failed to give an image.
            LocationError: The network or a service failed to give an image.
        """
        done = failures = 0
        while done < len(images):
            try:
                for outcome in self._work(images[done:]):
                    yield outcome
                    done, failures = done + 1, 0
            except _LostError as error:
                failures += 1
                if failures == _TRIES:
                    yield QuarantineError(str(error))
                    done, failures = done + 1, 0

    def close(self) -> None:
        """End the process."""
        _end_all(self._running)

    @property
    def process_id(self) -> int | None:
        """The id of the process, as long as there is one."""
        return self._running[0].process_id if self._running else None

    def _work(self, images: Sequence[ImageAt]) -> Iterator[SharedImage | QuarantineError]:
        """Work on a list of images as long as the process lives. Raises _LostError when it has died or is too slow."""
        if not self._running or not self._running[0].is_alive():
            self.close()
            self._running.append(_start_process(self._processor))
        process, finished = self._running[0], False
        try:
            process.begin(images)
            for image in images:
                yield process.receive(image, self._seconds)
                process.empty_slot()
            finished = True
        finally:
            if not finished:  # the process is somewhere in the middle of the list
                self.close()


class _LostError(Exception):
    """The process died or was too slow; the message becomes the image's reason for quarantine."""


class _Process:
    """A running process and its shared memory."""

    def __init__(self, processor: AnyProcessor) -> None:
        self._processor = processor
        memory = os.memfd_create("deepstack-views")
        try:
            os.ftruncate(memory, memory_bytes(processor))
            self._slots = ViewSlots(mmap.mmap(memory, 0), processor)
            self._slot = 0
            self._connection, theirs = Pipe()
            self._readable = select.poll()
            self._readable.register(self._connection.fileno(), select.POLLIN)
            with theirs, tempfile.TemporaryFile() as complaints:
                self._popen = _start(theirs, memory, complaints)
                theirs.close()
                self._greet(complaints)
        finally:
            os.close(memory)

    @property
    def process_id(self) -> int:
        return self._popen.pid

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def begin(self, images: Sequence[ImageAt]) -> None:
        """Send a list of images. Raises _LostError."""
        self._slot = 0
        self._send(list(images))

    def empty_slot(self) -> None:
        """Let the process use the slot of the image that was received last. Raises _LostError."""
        self._slot = (self._slot + 1) % SLOTS
        self._send(None)

    def receive(self, image: ImageAt, seconds: float) -> SharedImage | QuarantineError:
        """The result for the next image of the list. Raises _LostError, and errors that no image is to blame for."""
        answer = None if is_local(image) else self._wait(seconds)
        if answer is None and not is_local(image):
            raise LocationError(
                f"{image}: no answer within data.max_image_seconds ({seconds:g} s). Check the connection, then run the "
                "same command again."
            )
        if answer is None or answer == [Word.HAS_BYTES]:
            answer = self._wait(seconds)
        match answer:
            case None:
                raise _LostError(f"takes longer than data.max_image_seconds ({seconds:g} s), twice")
            case [Word.VIEWS, [*grid], [width, height], damage, sha256, sums]:
                slots = self._slots.views(self._slot)[: len(sums)]
                return SharedImage(slots, tuple(grid), (width, height), damage, sha256, sums)
            case [Word.QUARANTINE, str(reason)]:
                return QuarantineError(reason)
            case [Word.ERROR, str(name), str(message)]:
                raise _error(name, message)
        raise AssertionError(answer)

    def end(self) -> None:
        """Kill the process. Its memory is not used again, so a process that cannot be killed does no harm."""
        self._connection.close()
        self._popen.kill()
        self._wait_for_end()

    def _greet(self, complaints: IO[bytes]) -> None:
        try:
            self._send(self._processor)
            sign = self._wait(_START_SECONDS)
        except _LostError:
            sign = None
        if sign != [Word.READY]:
            self.end()
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            raise DataError(f"the process that decodes images does not start: {said[-1] if said else self._ending()}")

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise _LostError(self._ending()) from error

    def _wait(self, seconds: float) -> Any:
        """The next message; None if none comes in time. Raises _LostError if the process is gone."""
        try:
            milliseconds = min(seconds * 1000, _LONGEST_POLL)
            return json.loads(self._connection.recv_bytes()) if self._readable.poll(milliseconds) else None
        except (EOFError, OSError) as error:
            raise _LostError(self._ending()) from error

    def _ending(self) -> str:
        self._wait_for_end()
        code = self._popen.returncode
        if code is None:
            return "the process that decodes it hangs, twice"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process that decodes it dies ({how}), twice"

    def _wait_for_end(self) -> None:
        give_up = time.monotonic() + _END_SECONDS
        while self._popen.poll() is None and time.monotonic() < give_up:
            time.sleep(0.001)


def _start_process(processor: AnyProcessor) -> _Process:
    try:
        return _Process(processor)
    except OSError as error:
        raise DataError(
            f"the process that decodes images does not start: {error.strerror or error}. This is the machine's fault "
            "(memory, processes, open files); run the same command again when it is repaired."
        ) from error


def _error(name: str, message: str) -> errors.DeepStackError:
    """An error that the process met, by its class's name."""
    kind = getattr(errors, name, errors.DataError)
    return kind([message]) if issubclass(kind, errors.ConfigError) else kind(message)


def _start(connection: Connection, memory: int, complaints: IO[bytes]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, str(os.getpid()), str(connection.fileno()), str(memory)],
        env={**DECODER_ENVIRONMENT, **os.environ, "PYTHONPATH": path},
        pass_fds=(connection.fileno(), memory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=complaints,
    )


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


@lru_cache(maxsize=1)
def shared_decoder(processor: AnyProcessor, max_image_seconds: float) -> Decoder:
    """The decoder of this process, kept from one part to the next because its start takes half a second.

    Args:
        processor: What decides the pixels of the views.
        max_image_seconds: Longest time for one image; an image that takes longer is quarantined.

    Returns:
        The decoder of the last call if that had the same arguments, else a new one.
    """
    return Decoder(processor, max_image_seconds)
