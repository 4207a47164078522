"""Stores in a bucket: the same bytes as in a folder, whoever writes them, and after the connection was lost."""

from __future__ import annotations

import json
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import LocationError, StoreError
from orchestration.launch.before.probe import Fact, Questions, gather
from orchestration.preprocess.driver.lease import hold_lease


def objects(url: str) -> dict[str, bytes]:
    """Everything in a bucket's store by its path, but for the report."""
    found = (item for item in Location.parse(url).list("**") if item.is_file())
    return {str(item).removeprefix(f"{url}/"): item.read_bytes() for item in found if item.name != "report.json"}


def assert_same(url: str, folder: Path) -> None:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", ".lock"))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    found = objects(url)
    assert sorted(found) == sorted(files)
    assert [name for name in files if files[name] != found[name]] == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bucket_holds_the_same_bytes(corpus: Any, serial: Path, local_ray: None, bucket: str, workers: int) -> None:
    summary = corpus.preprocess(f"{bucket}/a/store.zarr", workers=workers)
    assert summary.store == f"{bucket}/a/store.zarr"
    assert_same(f"{bucket}/a/store.zarr", serial)
    again = corpus.preprocess(f"{bucket}/a/store.zarr", workers=workers)
    assert (again.samples, again.parts_done_before, again.nodes) == (summary.samples, summary.parts, {})


def test_the_second_job_on_a_bucket_is_refused(corpus: Any, bucket: str) -> None:
    with (
        hold_lease(Location.parse(f"{bucket}/store")),
        pytest.raises(StoreError, match=rf"{bucket}/store: another preprocessing job is writing this store"),
    ):
        corpus.preprocess(f"{bucket}/store")


def test_a_prefix_of_something_else_is_refused(corpus: Any, bucket: str) -> None:
    Location.parse(f"{bucket}/store/thesis.tex").create(b"")
    with pytest.raises(StoreError, match=r"not empty \(it holds thesis.tex\) and is no store of ours"):
        corpus.preprocess(f"{bucket}/store")


def test_launch_asks_a_node_about_a_store_in_a_bucket(
    corpus: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as the node's process does
    corpus.preprocess(f"{bucket}/store")
    recipe = Recipe(run_dir=str(tmp_path), data=DataConfig(stores=(f"{bucket}/store", f"{bucket}/none")))
    found = gather(Questions(recipe, str(tmp_path)), "127.0.0.1", "token").stores
    attributes = json.loads(Location.parse(f"{bucket}/store/zarr.json").read_bytes())["attributes"]
    assert found[f"{bucket}/store"] == Fact(value=attributes["plan_hash"])
    assert "no such folder" in found[f"{bucket}/none"].fault


class Proxy:
    """Passes requests on to the server until the `last`-th one whose first line holds `words`; then all is cut."""

    def __init__(self, server: str, words: bytes, last: int) -> None:
        self._target = (urlsplit(server).hostname, urlsplit(server).port)
        self._words, self._left = words, last
        self.cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut = True
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(self._target) as server,
            selectors.DefaultSelector() as selector,
            suppress(OSError),
        ):
            for side in (client, server):
                selector.register(side, selectors.EVENT_READ)
            while not self.cut:
                for key, _ in selector.select(0.05):
                    side = key.fileobj
                    assert isinstance(side, socket.socket)
                    data = side.recv(65536)
                    if not data:
                        return
                    if side is client and self._words in data.split(b"\r\n", 1)[0]:
                        self._left -= 1
                    if self._left < 0:
                        self.close()
                        return
                    (server if side is client else client).sendall(data)


@pytest.fixture
def proxy(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Two shards pass, the third does not."""
    import s3fs

    made = Proxy(s3_server, b"/images/pixels/c/", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    s3fs.S3FileSystem.clear_instance_cache()
    yield made
    made.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_lost_connection_stops_the_job_which_goes_on_later(
    corpus: Any, serial: Path, proxy: Proxy, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    url = f"{bucket}/store"
    with pytest.raises(LocationError, match=rf"{url}/\S+: the connection or its service failed"):
        corpus.preprocess(url)
    assert proxy.cut, "the fault did not fire"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    there = sorted(name for name in objects(url) if name.startswith("parts/"))
    assert there == ["parts/images-000000.json", "parts/images-000001.json"]
    Location.parse(f"{url}/.lock").delete()  # the lease of a process that would be gone by now
    assert corpus.preprocess(url).parts_done_before == 2
    assert_same(url, serial)
