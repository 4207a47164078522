"""Leaving samples out of a step that some rank could not read, under `data.unreadable: skip`.

Only the rank that reads a view knows; its replica's other ranks hold the sample's targets. So before the schedule all
ranks tell each other, in one reduction of a byte per sample of the global batch.
"""

from __future__ import annotations

import numpy as np

from megatron_deepstack.data.order.steps import LoadedStep, StepReader
from megatron_deepstack.parallel.agree import any_over_ranks
from megatron_deepstack.parallel.reduce import of_every_rank


def leave_out_unreadable(loaded: LoadedStep, reader: StepReader) -> tuple[LoadedStep, tuple[str, ...], str]:
    """Leave the samples out of a step that any rank could not read. Collective over all ranks.

    Args:
        loaded: This rank's step, with the samples that this rank could not read.
        reader: The reader that loaded it.

    Returns:
        The step without these samples; their ids over all replicas; and the reasons, one a line, for the console.
    """
    lost = any_over_ranks(np.isin(loaded.samples, [sample.index for sample in loaded.unreadable]))
    if not lost.any():
        return loaded, (), ""
    reasons = of_every_rank("\n".join(sample.reason for sample in loaded.unreadable))
    indices = set(loaded.samples[lost].tolist())
    places = [
        (micro_batch, row, member)
        for micro_batch, rows in enumerate(loaded.members)
        for row, members in enumerate(rows)
        for member, index in enumerate(members)
        if index in indices
    ]
    ids = reader.sample_ids(loaded.step)
    left_out = tuple(ids[position] for position in np.flatnonzero(lost))
    return loaded.without(places), left_out, "\n".join(filter(None, reasons))
