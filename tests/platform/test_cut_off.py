"""A broken connection to another rank is told from a rank's own exception, whoever prints it."""

from __future__ import annotations

import traceback

import pytest
import torch.distributed as dist

from megatron_deepstack.platform.processes.cut_off import exception_in, is_cut_off

NCCL = (
    "NCCL error in: NCCLUtils.cpp:75, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version "
    "2.27.3\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node-3<53344>"
)


@pytest.mark.parametrize(
    ("kind", "text", "cut_off"),
    [
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.2]:1", True),
        ("DistBackendError", "NCCL error in: ... remote process exited or there was a network error", True),
        ("torch.distributed.DistBackendError", NCCL, True),
        ("torch.distributed.DistStoreError", "timed out waiting for clients", True),
        ("RuntimeError", "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting", True),
        ("RuntimeError", "shape '[2]' is invalid for input of size 3", False),
        ("RuntimeError", "Unsupported data type for gloo", False),
        ("DistBackendError", "NCCL error in: ...\nncclInvalidUsage: This usually reflects invalid usage", False),
        ("AssertionError", "rows of gloo", False),
        ("ValueError", "connection closed by peer", False),
    ],
)
def test_broken_connections_are_told_from_own_exceptions(kind: str, text: str, cut_off: bool) -> None:
    assert is_cut_off(kind, text) is cut_off


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("one line"), "ValueError", "one line"),
        (dist.DistBackendError(NCCL), "torch.distributed.DistBackendError", NCCL),
        (RuntimeError("a\n  indented: b"), "RuntimeError", "a\n  indented: b"),
        (KeyError(), "KeyError", ""),
    ],
    ids=["one line", "several lines", "an indented line", "without words"],
)
@pytest.mark.parametrize("chained", [False, True])
def test_the_exception_of_a_traceback(error: Exception, kind: str, text: str, chained: bool) -> None:
    try:
        try:
            raise OSError("the first: cause")
        except OSError as cause:
            raise error from cause if chained else None
    except type(error):
        assert exception_in(traceback.format_exc()) == (kind, text)


def test_no_traceback_at_all() -> None:
    assert exception_in("") == ("", "")
