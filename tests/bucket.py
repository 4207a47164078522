"""A real S3 server on loopback (moto), for tests of buckets; its address is in the environment, as a user's."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of the server; it stands in the environment for the whole session, so that child processes find it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    yield os.environ["AWS_ENDPOINT_URL"]
    for name in (*CREDENTIALS, "AWS_ENDPOINT_URL"):
        os.environ.pop(name)
        if name in before:
            os.environ[name] = before[name]
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> Iterator[str]:
    """`s3://NAME` of an empty bucket of this test's own."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    name = f"test-{uuid.uuid4().hex[:12]}"
    system.mkdir(name)
    yield f"s3://{name}"
    system.invalidate_cache()
    system.rm(name, recursive=True)
