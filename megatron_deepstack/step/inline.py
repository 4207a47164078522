"""The baseline placement: ViT and projector inside the first stage's forward step, as other systems run them.

Nothing is exchanged; rows join the stage's graph, and the schedule's own backward reaches the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from megatron_deepstack.model.language import NO_VISUAL_INPUTS, VisualInputs
from megatron_deepstack.model.vision.encoder import VisualEncoder
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.planning.exchange.routes import RankRoutes
from megatron_deepstack.platform.compute.upload import upload_all
from megatron_deepstack.step.encode import EncoderPass
from megatron_deepstack.step.timeline import ENCODE, Timeline
from megatron_deepstack.step.visual import Key, take_rows, visual_inputs


class InlineEncoder:
    """Encodes a micro-batch's views when the schedule asks for its rows."""

    def __init__(
        self,
        encoder: VisualEncoder,
        all_views: Views,
        routes: RankRoutes,
        timeline: Timeline | None = None,
        indices: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Prepare for a step. Not collective.

        Args:
            encoder: The encoder, which only ranks of the first stage run.
            all_views: The views of this rank's units, in order.
            routes: This rank's side of the exchange, in which nothing crosses ranks.
            timeline: Where encodings are recorded, if they are.
            indices: `index_arrays` of the routes on the device; uploaded here if they are not given.
        """
        self.timeline = timeline
        self.encoder, self.views, self.routes = encoder, all_views, routes
        views = np.array([len(unit.views) for unit in routes.units], np.int64)
        self.first_view = np.concatenate([[0], np.cumsum(views)]).astype(np.int64)
        self.micro_batch = _micro_batch_of_units(routes)
        indices = upload_all(index_arrays(routes)) if indices is None else indices
        self.indices: dict[Key, Sequence[torch.Tensor]] = {
            key: indices[4 * number : 4 * number + 4] for number, key in enumerate(routes.chunks)
        }
        self.answers_gradients = routes.returns_gradients
        """Without sequence parallelism all tp ranks encode alike, and one of them has the gradient."""

    def of(self, micro_batch: int, vpp: int) -> VisualInputs:
        """Encode the views of one micro-batch. Not collective.

        Args:
            micro_batch: Its number in the step, from 0.
            vpp: Virtual stage, from 0.

        Returns:
            The rows that this chunk adds. On the rank that answers for their gradient they have a graph to the encoder.
        """
        chunk = self.routes.chunks.get((micro_batch, vpp))
        if chunk is None:
            return NO_VISUAL_INPUTS
        with nullcontext() if self.timeline is None else self.timeline.part(ENCODE, micro_batch):
            return self._encode(micro_batch, vpp)

    def _encode(self, micro_batch: int, vpp: int) -> VisualInputs:
        units = np.flatnonzero(self.micro_batch == micro_batch)
        first, stop = int(self.first_view[units[0]]), int(self.first_view[units[-1] + 1])
        views = self.views.part(first, stop, self.encoder.vit.vision)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.answers_gradients):
            rows = EncoderPass(self.encoder, views).live_rows
            if self.timeline is not None:
                self.timeline.watch_encoder_backward(rows)
            assert len(rows) == _num_rows(self.routes, units) + 1, "the encoder makes other rows than the plan says"
            table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            base_rows, slot_rows, base_positions, slot_positions = self.indices[micro_batch, vpp]
            base, slots = take_rows(table, base_rows), take_rows(table, slot_rows)
        return visual_inputs(base, slots, base_positions, slot_positions)


def index_arrays(routes: RankRoutes) -> list[np.ndarray]:
    """What the chunks of a step take from the tables of their micro-batches, on the host.

    Args:
        routes: This rank's side of the exchange.

    Returns:
        Four arrays of each chunk in turn: the table's rows that it takes, base and slots, and their positions.
    """
    arrays = []
    micro_batch_of_units = _micro_batch_of_units(routes)
    for (micro_batch, _), chunk in routes.chunks.items():
        index = _table_index(routes, np.flatnonzero(micro_batch_of_units == micro_batch))
        arrays += [index[chunk.base_rows], index[chunk.slot_rows], chunk.base_positions, chunk.slot_positions]
    return arrays


def _micro_batch_of_units(routes: RankRoutes) -> np.ndarray:
    return np.array([unit.micro_batch for unit in routes.units], np.int64)


def _num_rows(routes: RankRoutes, units: np.ndarray) -> int:
    return int(routes.first_rows[units[-1] + 1] - routes.first_rows[units[0]])


def _table_index(routes: RankRoutes, units: np.ndarray) -> np.ndarray:
    """For each received row of the step, and the zero row after them, its row in this micro-batch's table."""
    num_rows = _num_rows(routes, units) + 1
    first = int(routes.first_rows[units[0]])
    newline = routes.num_local_rows - 1
    index = np.where(routes.send_rows == newline, num_rows - 1, routes.send_rows - first)
    return np.append(index, num_rows)
