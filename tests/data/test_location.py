"""Locations: a folder and a bucket behave alike, files appear whole or not at all, lost connections are named."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from megatron_deepstack.data import location
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.writer import atomic_file, open_index
from megatron_deepstack.errors import ConfigError, LocationError
from megatron_deepstack.platform.files import rename


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        return Location.parse(tmp_path)
    return Location.parse(f"{request.getfixturevalue('bucket')}/below")


def put(location: Location, data: bytes) -> None:
    with location.write() as file:
        file.write(data)


def test_files_are_written_read_listed_and_deleted(root: Location) -> None:
    file = root.child("some/file.bin")
    assert not file.exists()
    assert not file.is_file()
    put(file, b"0123456789")
    put(file, b"abcdefghij")
    put(root.child("some/other.txt"), b"")
    assert file.exists()
    assert file.is_file()
    assert not file.is_folder()
    assert root.child("some").is_folder()
    assert not root.child("some").is_file()
    assert file.size() == 10
    assert file.read_bytes() == b"abcdefghij"
    assert [file.read_bytes(2, 3), file.read_bytes(8, 100), file.read_bytes(3, 0)] == [b"cde", b"ij", b""]
    assert root.child("some/other.txt").read_bytes() == b""
    with file.open_read() as stream:
        assert stream.read(2) == b"ab"
        stream.seek(5)
        assert stream.read() == b"fghij"
    assert [found.name for found in root.child("some").list()] == ["file.bin", "other.txt"]
    assert [str(found) for found in root.list("**/*.bin")] == [str(file)]
    file.delete()
    file.delete()
    assert not file.exists()


def test_what_is_missing_is_a_missing_file(root: Location) -> None:
    missing = root.child("missing")
    assert missing.list() == ()
    with pytest.raises(FileNotFoundError):
        missing.read_bytes()
    with pytest.raises(FileNotFoundError):
        missing.size()
    with pytest.raises(FileNotFoundError):
        missing.open_read()


def test_a_failed_write_leaves_nothing(root: Location) -> None:
    file = root.child("file")
    put(file, b"old")

    def fail() -> None:
        with file.write() as stream:
            stream.write(b"half of the new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_bytes() == b"old"
    assert [found.name for found in (*root.list(), *root.list(".*"))] == ["file"]


def test_threads_that_write_a_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each has a temporary file of its own, and the file is always one of the whole texts."""
    file = Location.parse(tmp_path / "file")
    inside = threading.Barrier(2)

    def write(text: bytes) -> None:
        with file.write() as stream:
            stream.write(text)
            inside.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"one", b"another")))
    assert file.read_bytes() in (b"one", b"another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_one_creates_a_file(root: Location) -> None:
    file = root.child("folder/record")
    file.create(b"first")
    with pytest.raises(FileExistsError):
        file.create(b"second")
    assert file.read_bytes() == b"first"


def refuse(number: int) -> Callable[..., None]:
    """A system call that a file system does not have."""

    def call(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    return call


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK], ids=errno.errorcode.get)
def test_only_one_creates_a_file_where_there_are_no_hard_links(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location.os, "link", refuse(number))
    test_only_one_creates_a_file(Location.parse(tmp_path))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["record"]


def test_of_many_processes_one_creates_a_file_where_there_are_no_hard_links(tmp_path: Path) -> None:
    code = (
        "import os, sys; from megatron_deepstack.data.location import Location\n"
        "def link(*names): raise PermissionError(1, 'no hard links')\n"
        "os.link = link; print('ready', flush=True); input()\n"
        f"try: Location.parse({str(tmp_path)!r}).child('record').create(sys.argv[1].encode() * 10**6)\n"
        "except FileExistsError: sys.exit(17)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        for name in "abcd"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    codes = {}
    for name, writer in zip("abcd", writers, strict=True):
        writer.communicate(timeout=240)
        codes[name] = writer.returncode
    assert sorted(codes.values()) == [0, 17, 17, 17]
    (winner,) = (name for name, code in codes.items() if code == 0)
    assert (tmp_path / "record").read_bytes() == winner.encode() * 10**6
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_a_file_system_without_any_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", refuse(errno.EPERM))
    monkeypatch.setattr(rename, "rename_new", refuse(errno.EINVAL))
    with pytest.raises(OSError, match=r"has neither hard links nor .* Take a folder on another one"):
        Location.parse(tmp_path).child("record").create(b"first")
    assert list(tmp_path.iterdir()) == []


def test_folders_with_the_signs_of_patterns(root: Location) -> None:
    file = root.child("odd [1]*/a")
    put(file, b"x")
    assert root.child("odd [1]*").list() == (file,)


@pytest.mark.parametrize(
    ("text", "local", "child"),
    [
        ("photos", True, "photos/a/b.jpg"),
        ("/photos/", True, "/photos/a/b.jpg"),
        ("file:///photos", True, "/photos/a/b.jpg"),
        ("odd:name//x", True, "odd:name//x/a/b.jpg"),
        ("s3://bucket/photos/", False, "s3://bucket/photos/a/b.jpg"),
        ("simplecache::s3://bucket", False, "simplecache::s3://bucket/a/b.jpg"),
        ("https://host/x", False, "https://host/x/a/b.jpg"),
    ],
)
def test_paths_and_urls(text: str, local: bool, child: str) -> None:
    location = Location.parse(text)
    assert (str(location), location.is_local, str(location.child("a/b.jpg"))) == (text, local, child)
    assert pickle.loads(pickle.dumps(location)) == location


def test_a_lost_connection_names_the_url_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    bucket = request.getfixturevalue("bucket")
    import s3fs

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    file = Location.parse(f"{bucket}/file")
    message = f"{bucket}/file: the connection or its service failed: .*Check network, address and credentials"
    for act in (file.exists, file.read_bytes, file.size, file.delete, lambda: file.create(b""), lambda: put(file, b"")):
        with pytest.raises(LocationError, match=message):
            act()
    s3fs.S3FileSystem.clear_instance_cache()


class FullDisk(io.BytesIO):
    name = "spool"

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


def no_folder(**options: object) -> IO[bytes]:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("spool", "reason"),
    [(lambda **options: FullDisk(), "No space left on device"), (no_folder, "Permission denied")],
    ids=["full", "forbidden"],
)
def test_a_spool_folder_without_room_is_named(
    monkeypatch: pytest.MonkeyPatch, spool: Callable[..., IO[bytes]], reason: str
) -> None:
    """Before anything is sent: no service is needed."""
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", spool)
    message = f"^{tempfile.gettempdir()}: s3://b/store/.* put together here before it is sent: {reason}.*TMPDIR"
    with pytest.raises(LocationError, match=message), atomic_file(Location.parse("s3://b/store/x")) as file:
        file.write(b"x")
    with pytest.raises(LocationError, match=message), open_index(Location.parse("s3://b/store")) as index:
        index.append("images/start", [1])


@pytest.mark.parametrize(
    ("url", "message"),
    [("nosuch://x/y", "nosuch://x/y: nosuch:// cannot be read or written: Protocol not known"), ("gs://b/x", "gcsfs")],
)
def test_a_service_without_its_package(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Location.parse(url).exists()


def test_local_files_need_no_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_deepstack.data.location import Location\n"
        f"root = Location.parse({str(tmp_path)!r})\n"
        "root.child('a').create(b'x'); root.list(); root.child('a').exists()\n"
        "assert 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=240)
