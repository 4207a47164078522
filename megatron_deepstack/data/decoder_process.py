"""The process in which images are read and decoded: a list of them in, one answer each out, views in shared memory.

Image decoders are C code that meets files from anywhere. Here one may crash or hang, and only this process is lost;
`data.decoder` is the other side, which starts it as a new interpreter: it inherits nothing but the import path.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection
from typing import Final

import numpy as np

from megatron_deepstack.data.image_source import ImageAt, QuarantineError, is_local, read_image
from megatron_deepstack.data.processor import Processor
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.planning.views import Grid

_READERS: Final = 8
"""Requests under way to a bucket, whose answers take 10 to 50 ms."""
_SET_PARENT_DEATH_SIGNAL: Final = 1


class Sign(Enum):
    """What the processes say to each other besides tasks and answers."""

    READY = "ready"
    HAS_BYTES = "has bytes"
    """The image is read; decoding begins. Said of images that come over a connection."""
    NEXT = "next"
    """The views in shared memory have been taken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An image whose views are in shared memory."""

    num_views: int
    grid: Grid
    size: tuple[int, int]
    damage: str | None
    sha256: str


def serve(connection: Connection, memory: int) -> None:
    """Do lists of images until the other side hangs up."""
    processor: Processor = connection.recv()
    shape = (processor.most_views, processor.crop_size, processor.crop_size, 3)
    views = np.frombuffer(mmap.mmap(memory, 0), np.uint8)[: int(np.prod(shape))].reshape(shape)
    connection.send(Sign.READY)
    while True:
        images: Sequence[ImageAt] = connection.recv()
        for image, data in _read_ahead(images, processor.max_image_pixels):
            connection.send(_answer(connection, processor, image, data, views))
            assert connection.recv() is Sign.NEXT


def _answer(
    connection: Connection, processor: Processor, image: ImageAt, data: Future[bytes], views: np.ndarray
) -> Answer | QuarantineError | DeepStackError:
    try:
        content = data.result()
        if not is_local(image):
            connection.send(Sign.HAS_BYTES)
        done = processor.process(content, views)
        return Answer(len(done.views), done.grid, done.size, done.damage, done.sha256)
    except (QuarantineError, DeepStackError) as error:
        return error


def _read_ahead(images: Sequence[ImageAt], max_pixels: int) -> Iterator[tuple[ImageAt, Future[bytes]]]:
    """Images with their bytes, in order: files when their turn comes, objects and members at URLs ahead of it."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[ImageAt, Future[bytes]]] = deque()
        for image in images:
            if is_local(image):
                waiting.append((image, _read_now(image, max_pixels)))
            else:
                waiting.append((image, pool.submit(read_image, image, max_pixels)))
            while len(waiting) > (0 if is_local(image) else _READERS):
                yield waiting.popleft()
        yield from waiting


def _read_now(image: ImageAt, max_pixels: int) -> Future[bytes]:
    done: Future[bytes] = Future()
    try:
        done.set_result(read_image(image, max_pixels))
    except (QuarantineError, DeepStackError) as error:
        done.set_exception(error)
    return done


def main() -> None:
    """Serve the process that started this one; its connection and the shared memory are given as arguments."""
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff and libjpeg complain there, of any file
    with suppress(EOFError, ConnectionError):  # the other side is gone
        serve(connection, memory)
