"""The process in which images are read and decoded: a list of them in, one answer each out, views in shared memory.

Image decoders are C code that meets files from anywhere. Here one may crash or hang, and only this process is lost;
`data.decoder` is the other side, which starts it as a new interpreter: it inherits nothing but the import path. The
other side unpickles nothing that comes from here: answers are JSON arrays, told apart by their first item:

    ready
    has bytes                                       the image is read, decoding begins; only of images at URLs
    views, grid, size, damage, sha256, crc32c       they are in shared memory; a checksum of each
    quarantine, reason
    error, class of megatron_deepstack.errors, message
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np

from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.data.images.source import ImageAt, QuarantineError, is_local, read_image
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.data.store.direct_file import BLOCK
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.platform.processes.parent import die_with_parent

SLOTS: Final = 2
"""Images whose views have room in shared memory: one is taken out while the next one is made."""
_READERS: Final = 8
"""Requests under way to a bucket, whose answers take 10 to 50 ms."""


class Word(StrEnum):
    """The first item of each answer."""

    READY = "ready"
    HAS_BYTES = "has bytes"
    VIEWS = "views"
    QUARANTINE = "quarantine"
    ERROR = "error"


class ViewSlots:
    """Shared memory for the views of `SLOTS` images, in whole blocks, so that they can be written from there.

    The views of an image begin `skip` bytes into their slot, as far as they begin into a block of their file.
    """

    def __init__(self, memory: mmap.mmap, processor: Processor) -> None:
        size = processor.crop_size
        self._bytes = np.frombuffer(memory, np.uint8).reshape(SLOTS, -1)
        self._shape = (processor.most_views, size, size, 3)

    def views(self, slot: int, skip: int) -> np.ndarray:
        """Room for the views of any image: uint8 (most views of an image, S, S, 3)."""
        return self._bytes[slot, skip : skip + math.prod(self._shape)].reshape(self._shape)

    def blocks(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot."""
        return self._bytes[slot, :num_bytes].data


def memory_bytes(processor: Processor) -> int:
    """Size of the shared memory in bytes."""
    views = processor.most_views * processor.crop_size**2 * 3
    return SLOTS * (-(-views // BLOCK) + 1) * BLOCK


def serve(connection: Connection, memory: int) -> None:
    """Do lists of images until the other side hangs up."""
    processor: Processor = connection.recv()
    slots = ViewSlots(mmap.mmap(memory, 0), processor)
    _say(connection, Word.READY)
    while True:
        images: Sequence[ImageAt]
        images, skip = connection.recv()
        for number, (image, data) in enumerate(_read_ahead(images, processor.max_image_pixels)):
            if number >= SLOTS:
                connection.recv()  # the slot has been emptied
            views = slots.views(number % SLOTS, skip)
            skip = (skip + _do_image(connection, processor, image, data, views)) % BLOCK
        for _ in images[:SLOTS]:
            connection.recv()


def _say(connection: Connection, *words: Any) -> None:
    connection.send_bytes(json.dumps(words).encode())


def _do_image(
    connection: Connection, processor: Processor, image: ImageAt, data: Future[bytes], views: np.ndarray
) -> int:
    """Write the image's views and say so, or why there are none; returns their size in bytes."""
    try:
        content = data.result()
        if not is_local(image):
            _say(connection, Word.HAS_BYTES)
        done = processor.process(content, views)
    except QuarantineError as error:
        _say(connection, Word.QUARANTINE, str(error))
    except DeepStackError as error:
        _say(connection, Word.ERROR, type(error).__name__, str(error))
    else:
        _say(connection, Word.VIEWS, done.grid, done.size, done.damage, done.sha256, checksums(done.views))
        return done.views.nbytes
    return 0


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
    """Serve the process that started this one; its id, connection and the shared memory are given as arguments."""
    parent, handle, memory = map(int, sys.argv[1:])
    connection = Connection(handle)
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff and libjpeg complain there, of any file
    with suppress(EOFError, ConnectionError):  # the other side is gone
        serve(connection, memory)
