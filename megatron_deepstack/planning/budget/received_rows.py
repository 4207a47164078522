"""The bytes that the rows of a step take on one rank, from the numbers of its rows: pure arithmetic, without a device.

A rank holds the rows that it makes (its *local table*) until they are sent, and the rows that its chunks add (its
*stored rows*) from then until their gradients have been returned. Rows and their gradients share one storage. The
exchange works in windows of columns, so temporary copies hold one window at a time. See `routing.exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from megatron_deepstack.config.choices import Switch

WINDOW_BYTES: Final = 256 << 20
"""Bytes of a step's rows, over all ranks of the replica, that one window holds. A rank has at most about two windows
beside its rows."""
MOST_WINDOWS: Final = 16
"""Largest number of windows. With more, the pieces of a row would be too short to copy quickly; with 16 they have 512
bytes at hidden size 4,096."""


HOST_SHARE: Final = 0.15
"""Share of a device's memory from which on a step's rows rest on the host, where `parallel.rows_on_host` is auto. Their
copies in the exchange cost time that rows on the device do not, so it is for steps that would hardly fit otherwise."""
FETCHED_AHEAD: Final = 1
"""Micro-batches whose rows are brought from the host before the forward pass that comes first needs them."""


def rest_on_host(choice: Switch, num_bytes: int, device_bytes: int | None) -> bool:
    """Decide where the received rows of a step rest. Each rank decides for itself; nothing that it sends depends on it.

    Args:
        choice: `parallel.rows_on_host`.
        num_bytes: Bytes of the rows that the rank receives in the step, over all micro-batches.
        device_bytes: Memory of its device; None where that is not known, as on a CPU.

    Returns:
        Whether they rest on the host.
    """
    if choice is Switch.AUTO:
        return device_bytes is not None and num_bytes > HOST_SHARE * device_bytes
    return choice is Switch.ALWAYS and num_bytes > 0


@dataclass(frozen=True, slots=True)
class RowBytes:
    """The most bytes of rows that one rank holds at once, in the three parts of a step that hold any."""

    sending: int
    """While rows travel to the ranks that add them: the local table, the stored rows, and one window."""
    schedule: int
    """While the pipeline runs: the stored rows, and the gradients of one micro-batch before they take their place."""
    returning: int
    """While gradients travel back: those of the stored rows and of the local table, and one window."""

    @property
    def peak(self) -> int:
        """The largest of the three. Activations of the pipeline are alive in `schedule` only."""
        return max(self.sending, self.schedule, self.returning)


def num_windows(replica_rows: int, hidden_size: int, element_bytes: int) -> int:
    """Return the number of windows in which the rows of a step are exchanged, the same on all ranks of a replica.

    Args:
        replica_rows: Rows that all ranks of the replica make together (`RankRoutes.num_replica_rows`).
        hidden_size: Width of the decoder, H.
        element_bytes: Bytes of one number of a row: 2 in bf16, 4 in float32.

    Returns:
        At least 1.
    """
    total = replica_rows * hidden_size * element_bytes
    return max(1, min(MOST_WINDOWS, -(-total // WINDOW_BYTES), hidden_size))


def row_bytes(
    *,
    local_rows: int,
    sent_rows: int,
    stored_rows: int,
    replica_rows: int,
    micro_batches: int,
    hidden_size: int,
    element_bytes: int,
    learns: bool = True,
) -> RowBytes:
    """Return the bytes that the rows of a step take on one rank.

    Args:
        local_rows: Rows that the rank makes, including the newline (`RankRoutes.num_local_rows`).
        sent_rows: Rows that it sends, each as often as it is sent (`sum(RankRoutes.send_splits)`).
        stored_rows: Rows that its chunks add over all micro-batches, with padding (`len(RankRoutes.stored_rows)`).
        replica_rows: Rows that all ranks of the replica make together.
        micro_batches: Micro-batches of the step, of which one has gradients beside its rows at a time.
        hidden_size: Width of the decoder, H.
        element_bytes: Bytes of one number of a row.
        learns: Whether the tower or the projector learns. Without, no row has a gradient and none is returned.

    Returns:
        Bytes by part of the step.
    """
    row = hidden_size * element_bytes
    windows = num_windows(replica_rows, hidden_size, element_bytes)
    window_of_sent, window_of_stored = (-(-rows * row // windows) for rows in (sent_rows, stored_rows))
    stored = stored_rows * row
    sending = local_rows * row + stored + window_of_sent + 2 * window_of_stored  # as they arrive, and in their places
    if not learns:
        return RowBytes(sending=sending, schedule=stored, returning=0)
    return RowBytes(
        sending=sending,
        schedule=stored + -(-stored // max(micro_batches, 1)),
        returning=stored + local_rows * row + window_of_sent + window_of_stored,
    )
