"""The age of a file by the clock of its file system, and by this machine's where that cannot be asked."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megatron_deepstack.platform.files import age
from megatron_deepstack.platform.files.age import age_seconds


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_text("")
    written = found.stat().st_mtime - 100
    os.utime(found, (written, written))
    return found


def test_the_clock_of_this_machine_is_not_asked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    monkeypatch.setattr(time, "time", lambda: before + 3600)
    assert 100 <= age_seconds(file) < 3600
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_where_nothing_can_be_written_beside_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(age.tempfile, "TemporaryFile", refuse)
    assert 100 <= age_seconds(file) < 3600


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        age_seconds(tmp_path / "none")
