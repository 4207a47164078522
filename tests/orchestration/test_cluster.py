"""Reaching a Ray cluster."""

import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_deepstack.errors import ClusterError, ConfigError
from megatron_deepstack.platform.files.scratch import hold_new
from orchestration import cluster, ray_folder


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_unreachable_cluster_is_named_at_once(
    unused_port: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", never)
    address = f"{scheme}127.0.0.1:{unused_port}"
    with (
        pytest.raises(ConfigError, match=f"--address {address}: no Ray cluster answers there: .*refused"),
        cluster.ray_session(2, address, {}),
    ):
        pass


def other_version() -> None:
    from ray._private.utils import check_version_info

    check_version_info({"ray_version": "2.9.0", "python_version": "3.9.1"}, "node 10.0.0.1")


def no_token() -> None:
    from ray.exceptions import AuthenticationError

    raise AuthenticationError("Token authentication is enabled but no authentication token was found")


@pytest.mark.parametrize(
    ("refuse", "words"),
    [(other_version, r"started with: Ray: 2\.9\.0 Python: 3\.9\.1 This .* need the same Ray and the same Python;"),
     (no_token, r"no authentication token was found.* wants RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN here")],
    ids=["version", "token"],
)  # fmt: skip
def test_a_cluster_that_does_not_let_us_in_is_an_error_of_ours(refuse: Callable[[], None], words: str) -> None:
    """What Ray 2.60 raises there: seen with a head node of another version, and of a token that this process lacks."""
    shut = []
    ray = SimpleNamespace(init=lambda **_: refuse(), shutdown=lambda: shut.append(True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"--address {address}: the Ray cluster there does not let .*{words}"):
            cluster._join(ray, address)
    assert shut


def test_a_wrong_token_is_thought_of_where_nothing_answers() -> None:
    """Ray 2.60 tries for 20 s and then says of a wrong token only that it could not connect."""

    def give_up(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    with pytest.raises(ConfigError, match=r"no Ray cluster answers there: .* wants RAY_AUTH_MODE=token and its"):
        cluster._join(SimpleNamespace(init=give_up), "auto")


def test_the_environments_address_counts(unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused_port}")
    with pytest.raises(ConfigError, match="no Ray cluster answers"), cluster.ray_session(2, None, {}):
        pass


@pytest.mark.slow
def test_a_ray_of_our_own_is_out_of_reach_of_other_machines(local_ray: None) -> None:
    """Every server that this process and Ray's own have opened, workers' included."""
    import ray

    ray.get(ray.remote(lambda: None).remote())
    listening = [
        (process.name(), connection.laddr.ip)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert [one for one in listening if not one[1].startswith(("127.", "::ffff:127.", "::1"))] == []


@pytest.mark.parametrize(
    ("free_mib", "words", "kept"),
    [
        (4096, r"The current node timed out during startup\. See its load, .* in FOLDER/r/session_latest/logs", True),
        (1, r"its folder FOLDER is on a full disk: 1\.0 MiB free, expected 32 MiB\. Make room there, or name another "
            r"folder in RAY_TMPDIR, .* Ray said: The current node timed out", False),
    ],
    ids=["slow machine", "full disk"],
)  # fmt: skip
def test_a_ray_that_does_not_start_is_an_error_of_ours(
    free_mib: int, words: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of the cause is said; logs that the error names are left there."""

    def give_up(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    shut = []
    never = SimpleNamespace(init=give_up, shutdown=lambda: shut.append(True))
    with hold_new(tmp_path, "x") as folder:
        disk = SimpleNamespace(f_bavail=free_mib, f_frsize=1 << 20, f_files=9, f_favail=9)
        monkeypatch.setattr(ray_folder.os, "statvfs", lambda _: disk)
        with pytest.raises(ClusterError, match=words.replace("FOLDER", str(folder.path))):
            cluster._start(never, workers=2, gpus=0, folder=folder)
    assert len(shut) == (2 if kept else 1)
    assert folder.path.exists() is kept


def test_a_ray_that_was_too_slow_is_started_once_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What was up of the first is ended, and the user is told."""
    halves: list[subprocess.Popen[bytes]] = []

    with hold_new(tmp_path, "x") as folder:

        def slow_at_first(**_: object) -> None:
            if halves:
                assert not psutil.pid_exists(halves[0].pid)
                return
            halves.append(subprocess.Popen([sys.executable, "-c", "__import__('signal').pause()", str(folder.path)]))
            raise Exception("The current node timed out during startup.")

        cluster._start(SimpleNamespace(init=slow_at_first, shutdown=lambda: None), workers=2, gpus=0, folder=folder)
    halves[0].wait()
    assert "Ray was not up within its 30 s" in capfd.readouterr().err
    assert not folder.path.exists()


def test_ray_lives_in_a_folder_of_ours(local_ray: None) -> None:
    """A private one; and its socket paths are no longer than what is asked of a place allows."""
    import ray

    node = ray._private.worker._global_node
    given = Path(node.get_session_dir_path()).parent
    assert (given.name, given.parent.name.rstrip("0123456789")) == (ray_folder._INNER, f"{ray_folder._KIND}-")
    assert stat.S_IMODE(given.parent.stat().st_mode) == 0o700
    sockets = list((Path(node.get_session_dir_path()) / "sockets").iterdir())
    assert max(len(f"/{path.relative_to(given)}") for path in sockets) <= len(ray_folder._BELOW)
