"""What a rank raises when another one has left it: the broken connections of gloo, NCCL and torch's store.

When one rank dies, collectives of the others break, and each raises an exception of its own. Those are consequences:
they are not blamed, their tracebacks are not shown, and they say nothing against another attempt. Whoever judges an
exception of a rank asks here, so that `train`, torchrun and `launch` come to one answer.
"""

from __future__ import annotations

from typing import Final

_WORDS: Final = (
    "connection closed by",  # gloo: "by peer"; NCCL: "by remote peer"
    "connection refused",
    "connection reset",
    "broken pipe",
    "gloo/transport",
    "remote process exited",
    "ncclremoteerror",
    "ncclsystemerror",
    "nccl communicator was aborted",
    "socket",
    "timed out waiting",
    "timed out after waiting",
    "store->get",
)
_KINDS: Final = (
    "DistError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "ConnectionError",
    "RuntimeError",
)
_HEADER: Final = "Traceback (most recent call last):\n"


def is_cut_off(kind: str, text: str) -> bool:
    """Whether an exception is a broken connection to another rank: the consequence of another rank's end, as a rule.

    Args:
        kind: Name of the exception's class, with or without its module.
        text: What it says, all lines of it: NCCL names the connection in the last one.

    Returns:
        True if both are what gloo, NCCL or torch's store raise when the other side of a connection is gone.
    """
    lowered = text.lower()
    return kind.rpartition(".")[2] in _KINDS and any(words in lowered for words in _WORDS)


def exception_in(trace: str) -> tuple[str, str]:
    """The exception that a traceback ends with.

    Args:
        trace: As `traceback.format_exc` writes it.

    Returns:
        The name of its class and what it says, which may have several lines.
    """
    lines = trace.rpartition(_HEADER)[2].rstrip().split("\n")
    frames = (number for number, line in enumerate(lines) if not line.startswith(" "))
    kind, _, text = "\n".join(lines[next(frames, 0) :]).partition(":")
    return kind, text.removeprefix(" ")
