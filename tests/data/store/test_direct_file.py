"""Direct writes: the same bytes as ordinary ones, whatever the sizes, and whatever the file system allows."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.data.store import direct_file
from megatron_deepstack.data.store.direct_file import DirectFile

PIECE = 4 << 20


def write(path: Path, chunks: list[bytes]) -> None:
    with open(path, "wb") as file, closing(DirectFile(file)) as direct:
        for chunk in chunks:
            direct.write(chunk)
        direct.finish()


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [4096], [4095, 2], [PIECE], [PIECE - 1, 2], [338688] * 40 + [5124], [2 * PIECE + 4097, 0, 100]],
)
def test_bytes_are_those_written(tmp_path: Path, sizes: list[int]) -> None:
    random = np.random.default_rng(0)
    chunks = [random.bytes(size) for size in sizes]
    write(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)


def test_a_buffer_may_be_changed_once_it_is_written(tmp_path: Path) -> None:
    views = np.zeros((3, 1 << 20), np.uint8)
    with open(tmp_path / "file", "wb") as file, closing(DirectFile(file)) as direct:
        for value in range(20):
            views[...] = value
            direct.write(views.data)
        direct.finish()
    written = np.fromfile(tmp_path / "file", np.uint8).reshape(20, -1)
    assert (written == np.arange(20, dtype=np.uint8)[:, None]).all()


def blocks_of(data: bytes, skip: int) -> memoryview:
    """Memory from a block's boundary on, with the data `skip` bytes into it."""
    memory = memoryview(mmap.mmap(-1, skip + max(1, len(data))))[: skip + len(data)]
    memory[skip:] = data
    return memory


@pytest.mark.parametrize(
    "sizes", [[338688] * 40, [1, 4095, 4096, 0, 4097], [100] * 50, [0, 8191, 1], [3 * 338688, 2 * 338688, 5124]]
)
@pytest.mark.parametrize("wrong_every", [100, 2, 3])
def test_blocks_that_lie_as_in_the_file(tmp_path: Path, sizes: list[int], wrong_every: int) -> None:
    """Those that do not, and ordinary writes between them, are copied."""
    random = np.random.default_rng(0)
    chunks = [random.bytes(size) for size in sizes]
    written = 0
    with open(tmp_path / "file", "wb") as file, closing(DirectFile(file)) as direct:
        for number, chunk in enumerate(chunks):
            skip = (written + (number % wrong_every == 1)) % direct_file.BLOCK
            direct.write_in_place(blocks_of(chunk, skip), skip)
            written += len(chunk)
        direct.write(b"the end")
        direct.finish()
    assert (tmp_path / "file").read_bytes() == b"".join([*chunks, b"the end"])


def test_what_lies_as_in_the_file_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, addresses = os.write, []

    def note(descriptor: int, data: memoryview) -> int:
        addresses.append(np.frombuffer(data, np.uint8).ctypes.data)
        return real(descriptor, data)

    monkeypatch.setattr(direct_file.os, "write", note)
    with open(tmp_path / "file", "wb") as file, closing(DirectFile(file)) as direct:
        first, second = blocks_of(bytes(10_000), 0), blocks_of(bytes(10_000), 10_000 % 4096)
        direct.write_in_place(first, 0)
        direct.write_in_place(second, 10_000 % 4096)
    assert addresses == [np.frombuffer(memory, np.uint8).ctypes.data for memory in (first, second)]


def test_a_file_system_that_knows_no_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some refuse the flag, others take it and refuse the writes."""
    real, refused = os.write, []

    def refuse(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(direct_file.os, "write", refuse)
    chunks = [bytes([number]) * 1_000_001 for number in range(10)]
    write(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)
    assert len(refused) <= 1


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", [b"some"])
