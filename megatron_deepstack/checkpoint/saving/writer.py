"""The process that writes a rank's checkpoint files while training goes on.

Each rank starts one, which waits for tasks on a pipe. A task names files and where in the shared host memory their
tensors lie; their content is what PyTorch's distributed checkpoints hold. Checksums are taken of the bytes as they are
written, each file is fsynced, and last comes a note of what lies where. The process ends with its rank, and ignores
the signals that ask a job to stop: its rank decides when it ends.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, cast

import google_crc32c
import torch

from megatron_deepstack.platform.processes.parent import die_with_parent

NOTE = ".written_by_rank_{rank}.json"
"""Note of a rank that has written its files, beside them until the checkpoint is committed."""

_BLOCK_BYTES = 1 << 20

Item = tuple[str, list[int] | None, int | None]
"""Place of a tensor or object in the checkpoint: key, offset, and number among the rank's parts of that key."""


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A tensor in the shared memory."""

    item: Item
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class FileTask:
    """One data file."""

    name: str
    objects: list[tuple[Item, bytes]]
    tensors: list[StagedTensor]


@dataclass(frozen=True, slots=True)
class WriteTask:
    """What one rank writes of a checkpoint."""

    folder: str
    rank: int
    files: list[FileTask]
    small_files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a task: bytes written, or what went wrong."""

    num_bytes: int
    error: str | None


class ChecksummedFile:
    """A new file that counts its bytes and takes their checksum as they are written. A context manager: `close` ends a
    whole file, and the end of the block also one that could not be written.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or empty one that exists."""
        self._stream = path.open("wb")
        self._checksum = google_crc32c.Checksum()
        self.num_bytes = 0

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError) if kind is not None else nullcontext():  # the first error is the one to raise
            self._stream.close()

    def write(self, content: Any) -> int:
        """Append bytes or anything with a buffer."""
        view = memoryview(content).cast("B")
        for begin in range(0, len(view), _BLOCK_BYTES):  # the checksum takes `bytes` only: copies that fit the cache
            self._checksum.update(bytes(view[begin : begin + _BLOCK_BYTES]))
        self.num_bytes += len(view)
        self._stream.write(view)
        return len(view)

    def flush(self) -> None:
        """Asked for by `torch.save`; nothing needs it before `close`."""

    def close(self) -> tuple[int, int]:
        """Bring the content to the disk; size in bytes and crc32c."""
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return self.num_bytes, int.from_bytes(self._checksum.digest(), "big")


def write_task(task: WriteTask, memory: mmap.mmap) -> int:
    """Write the files of a task and then its note.

    Args:
        task: What to write, and where.
        memory: The memory shared with the rank, which holds the tensors.

    Returns:
        Bytes written, without the note.

    Raises:
        OSError: The disk refuses.
    """
    files = (
        (file.name, file.objects, ((tensor.item, _tensor(tensor, memory)) for tensor in file.tensors))
        for file in task.files
    )
    return write_files(Path(task.folder), task.rank, task.small_files, files)


DataFile = tuple[str, Sequence[tuple[Item, bytes]], Iterable[tuple[Item, torch.Tensor]]]
"""Name, objects and tensors of a data file. A tensor's storage is written whole, so it holds exactly its own bytes."""


def write_files(folder: Path, rank: int, small_files: Mapping[str, bytes], data_files: Iterable[DataFile]) -> int:
    """Write a rank's files and then the note of what lies where. Tensors are taken one at a time.

    Args:
        folder: The partial folder of the checkpoint, which is made if it is not there.
        rank: The rank whose files they are.
        small_files: Files that are written as they are.
        data_files: Files of objects and tensors.

    Returns:
        Bytes written, without the note.

    Raises:
        OSError: The disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[int, int]] = {}
    items: list[list[Any]] = []
    for name, content in small_files.items():
        with ChecksummedFile(folder / name) as stream:
            stream.write(content)
            files[name] = stream.close()
    for name, objects, tensors in data_files:
        with ChecksummedFile(folder / name) as stream:
            for item, content in objects:
                begin = stream.num_bytes
                stream.write(content)
                items.append([*item, name, begin, stream.num_bytes - begin])
            for item, tensor in tensors:
                begin = stream.num_bytes
                torch.save(tensor, cast(IO[bytes], stream))
                items.append([*item, name, begin, stream.num_bytes - begin])
            files[name] = stream.close()
    with ChecksummedFile(folder / NOTE.format(rank=rank)) as note:
        note.write(json.dumps({"files": files, "items": items}).encode())
        note.close()
    return sum(size for size, _ in files.values())


def _tensor(tensor: StagedTensor, memory: mmap.mmap) -> torch.Tensor:
    """The tensor with a storage of exactly its own bytes, which is what `torch.save` writes."""
    count = 1
    for size in tensor.shape:
        count *= size
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=tensor.offset).view(tensor.shape)


def serve(rank_pid: int, pipe_handle: int, memory_handle: int) -> None:
    """Main function of the writer process: answer jobs until the rank closes the pipe or dies.

    Args:
        rank_pid: Process id of the rank.
        pipe_handle: File descriptor of the pipe to the rank.
        memory_handle: File descriptor of the memory shared with the rank.
    """
    die_with_parent(rank_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        _answer_jobs(Connection(pipe_handle), memory_handle)


def _answer_jobs(pipe: Connection, memory_handle: int) -> None:
    memory = None
    while True:
        task: WriteTask = pipe.recv()
        size = os.fstat(memory_handle).st_size
        if size and (memory is None or len(memory) != size):
            memory = mmap.mmap(memory_handle, size)
        pipe.send(_reply_to(task, memory or mmap.mmap(-1, 1)))


def _reply_to(task: WriteTask, memory: mmap.mmap) -> Reply:
    try:
        return Reply(num_bytes=write_task(task, memory), error=None)
    except Exception as error:
        said = _cause(error)
        return Reply(num_bytes=0, error=str(said) or repr(said))


def _cause(error: BaseException) -> BaseException:
    """The disk's own error if there is one: torch's writer fails again while closing its file, and hides the first."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error
