"""Names that are given once, on file systems that lose answers or cannot do everything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_deepstack.platform.files.rename import sync
from megatron_deepstack.platform.files.write_whole import create_whole

LINK = os.link


def test_a_request_that_was_sent_twice_has_succeeded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server made the link, its answer was lost, and the client's second request finds the name there."""

    def twice(source: Path, target: Path) -> None:
        LINK(source, target)
        LINK(source, target)

    monkeypatch.setattr("os.link", twice)
    create_whole(tmp_path / "one", "ours")
    assert (tmp_path / "one").read_text() == "ours"
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "one", "another's")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_synced_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = tmp_path / "file"
    file.write_text("")

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(file)


def test_a_disk_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)
