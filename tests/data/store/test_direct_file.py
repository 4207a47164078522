"""Direct writes: the same bytes as ordinary ones, whatever the sizes, and whatever the file system allows."""

from __future__ import annotations

import errno
import fcntl
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
