"""Run folders that cannot be written: told in one line, with what to do."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_deepstack.errors import RunFolderError
from megatron_deepstack.platform.files.run_disk import require_room, require_writable, size_text, writing
from megatron_deepstack.platform.files.write_whole import create_whole, write_result, write_whole

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount("size=64k")`: a small file system; mounting one takes root."""
    mounted: list[Path] = []

    def mounting(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mounting
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take all room of a small file system."""
    with (folder / "filler").open("wb") as file:
        free = os.statvfs(folder)
        file.write(b"x" * (free.f_bavail * free.f_frsize))


def test_a_folder_is_made_and_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for run_dir in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(
            RunFolderError, match=r"^run_dir: .* cannot be written .*Remove the file that is in the way"
        ):
            require_writable(run_dir)


def test_a_read_only_file_system(mount: Mount) -> None:
    folder = mount("ro")
    with pytest.raises(RunFolderError, match=r"Read-only file system.*Mount that file system for writing"):
        require_writable(folder / "run")


def test_a_full_disk(mount: Mount) -> None:
    folder = mount("size=64k")
    (folder / "run").mkdir()
    fill(folder)
    with pytest.raises(RunFolderError, match=r"No space left on device.*Make room on that disk"):
        require_writable(folder / "run")
    with pytest.raises(
        RunFolderError, match=r"has 0\.0 MiB free; expected 2\.0 GiB for 3 checkpoints.*checkpoint\.keep"
    ):
        require_room(folder / "run", 2 << 30, "3 checkpoints")


def test_a_full_disk_leaves_what_a_file_had(mount: Mount) -> None:
    folder = mount("size=64k")
    write_whole(folder / "recipe.yaml", "first")
    fill(folder)
    words = r"recipe\.yaml: cannot be written \(No space left on device"
    with pytest.raises(RunFolderError, match=words) as caught, writing(folder / "recipe.yaml"):
        write_whole(folder / "recipe.yaml", "second" * 10_000)
    assert "run the same command again: it goes on from the newest checkpoint" in str(caught.value)
    assert (folder / "recipe.yaml").read_text() == "first"
    assert sorted(path.name for path in folder.iterdir()) == ["filler", "recipe.yaml"]


def test_a_result_on_a_full_disk_leaves_the_earlier_one(mount: Mount) -> None:
    folder = mount("size=64k")
    write_result(folder / "report.html", "first")
    fill(folder)
    with pytest.raises(OSError, match="No space left"):
        write_result(folder / "report.html", "second" * 10_000)
    assert (folder / "report.html").read_text() == "first"
    with pytest.raises(RunFolderError, match="No space left"):
        require_writable(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["filler", "report.html"]


def test_a_result_goes_where_a_link_leads_and_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_result(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_result(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


ADVICE = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "raise its quota",
    errno.EROFS: "Mount that file system for writing",
    errno.ENOTDIR: "Remove the file that is in the way",
    errno.EACCES: "Change its permissions",
}


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
def test_each_answer_of_a_disk_has_its_advice(number: int) -> None:
    words = re.escape(os.strerror(number)) + ".*" + ADVICE[number]
    with pytest.raises(RunFolderError, match=words), writing(Path("run/metrics.jsonl")):
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")


def test_one_of_several_creates_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    create_whole(tmp_path / "one", "first")
    monkeypatch.setattr("os.link", no_links)
    create_whole(tmp_path / "two", "first")
    for name in ("one", "two"):
        with pytest.raises(FileExistsError):
            create_whole(tmp_path / name, "second")
        assert (tmp_path / name).read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 2


def test_sizes_for_people() -> None:
    assert (size_text(3 << 30), size_text(5 << 20)) == ("3.0 GiB", "5.0 MiB")
