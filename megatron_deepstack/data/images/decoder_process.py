"""The process that reads and decodes images: it receives a list of them, answers each, and puts views in shared memory.

Image decoders are C code that meets files from anywhere. If one crashes or hangs here, only this process is lost.
`data.images.decoder` is the other side: it starts this process as a new interpreter, which inherits nothing but the
import path. The other side unpickles nothing that comes from here: answers are JSON arrays, which differ in their first
item:


    ready
    has bytes                                       the image is read, decoding begins; only for images at URLs
    views, grid, size, damage, sha256, crc32c       the views are in shared memory; one checksum for each
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

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.data.images.processors import AnyProcessor
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.images.source import FramesAt, ImageAt, QuarantineError, files_of, is_local, read_image
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.platform.processes.parent import die_with_parent

SLOTS: Final = 2
"""Images whose views fit into shared memory: one is taken out while the next one is made."""
_READERS: Final = 8
"""Requests to a bucket at the same time; an answer takes 10 to 50 ms."""


class Word(StrEnum):
    """The first item of each answer."""

    READY = "ready"
    HAS_BYTES = "has bytes"
    VIEWS = "views"
    QUARANTINE = "quarantine"
    ERROR = "error"


class ViewSlots:
    """Shared memory for the views of `SLOTS` images."""

    def __init__(self, memory: mmap.mmap, processor: AnyProcessor) -> None:
        self._views = np.frombuffer(memory, np.uint8).reshape(SLOTS, *_slot_shape(processor))

    def views(self, slot: int) -> np.ndarray:
        """Space for the slots of any image: uint8 (most slots of an image, *slot_shape)."""
        return self._views[slot]


def _slot_shape(processor: AnyProcessor) -> tuple[int, ...]:
    return processor.most_slots, *processor.pixels(1, 1, Compression.NONE).slot_shape


def memory_bytes(processor: AnyProcessor) -> int:
    """The size of the shared memory in bytes."""
    return SLOTS * math.prod(_slot_shape(processor))


def serve(connection: Connection, memory: int) -> None:
    """Work on lists of images until the other side closes the connection.

    Args:
        connection: Gives the processor first, then pairs of a list of images and the offset of its first view in a
            block.
        memory: Descriptor of the shared memory, which has `memory_bytes` bytes.

    Raises:
        EOFError: The other side has closed the connection.
    """
    processor: AnyProcessor = connection.recv()
    slots = ViewSlots(mmap.mmap(memory, 0), processor)
    _say(connection, Word.READY)
    while True:
        images: Sequence[ImageAt] = connection.recv()
        for number, (image, data) in enumerate(_read_ahead(images, processor.max_image_pixels)):
            if number >= SLOTS:
                connection.recv()  # the slot has been emptied
            _do_image(connection, processor, image, data, slots.views(number % SLOTS))
        for _ in images[:SLOTS]:
            connection.recv()


def _say(connection: Connection, *words: Any) -> None:
    connection.send_bytes(json.dumps(words).encode())


def _do_image(
    connection: Connection, processor: AnyProcessor, image: ImageAt, data: Future[tuple[bytes, ...]], views: np.ndarray
) -> None:
    """Write the image's views and report them, or report why there are none."""
    try:
        contents = data.result()
        if not is_local(image):
            _say(connection, Word.HAS_BYTES)
        if isinstance(image, FramesAt):
            assert isinstance(processor, SizedProcessor)
            done = processor.process_pair(contents, image, views)
        else:
            done = processor.process(contents[0], views)
    except QuarantineError as error:
        _say(connection, Word.QUARANTINE, str(error))
    except DeepStackError as error:
        _say(connection, Word.ERROR, type(error).__name__, str(error))
    else:
        _say(connection, Word.VIEWS, done.grid, done.size, done.damage, done.sha256, checksums(done.slots))


def _read_ahead(images: Sequence[ImageAt], max_pixels: int) -> Iterator[tuple[ImageAt, Future[tuple[bytes, ...]]]]:
    """Images with their bytes, in order: local files are read when their turn comes, images at URLs before it."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[tuple[ImageAt, Future[tuple[bytes, ...]]]] = deque()
        for image in images:
            if is_local(image):
                waiting.append((image, _read_now(image, max_pixels)))
            else:
                waiting.append((image, pool.submit(_read, image, max_pixels)))
            while len(waiting) > (0 if is_local(image) else _READERS):
                yield waiting.popleft()
        yield from waiting


def _read(image: ImageAt, max_pixels: int) -> tuple[bytes, ...]:
    if isinstance(image, FramesAt) and image.fault is not None:
        raise QuarantineError(image.fault)
    return tuple(read_image(file, max_pixels) for file in files_of(image))


def _read_now(image: ImageAt, max_pixels: int) -> Future[tuple[bytes, ...]]:
    done: Future[tuple[bytes, ...]] = Future()
    try:
        done.set_result(_read(image, max_pixels))
    except (QuarantineError, DeepStackError) as error:
        done.set_exception(error)
    return done


def main() -> None:
    """Serve the process that started this one; its id, connection and the shared memory are given as arguments."""
    parent, handle, memory = map(int, sys.argv[1:])
    connection = Connection(handle)
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff and libjpeg write warnings there
    with suppress(EOFError, ConnectionError):  # the other side has closed the connection
        serve(connection, memory)
