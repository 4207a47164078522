"""Reaching a Ray cluster."""

import socket
import sys
from types import SimpleNamespace

import pytest

from megatron_deepstack.errors import ConfigError
from orchestration import cluster


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


def test_the_environments_address_counts(unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused_port}")
    with pytest.raises(ConfigError, match="no Ray cluster answers"), cluster.ray_session(2, None, {}):
        pass
