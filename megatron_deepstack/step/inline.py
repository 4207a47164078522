"""The baseline placement: ViT and projector inside the first stage's forward step, as other systems run them.

Nothing is exchanged; rows join the stage's graph, and the schedule's own backward reaches the encoder.
"""

from __future__ import annotations

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
        self, encoder: VisualEncoder, all_views: Views, routes: RankRoutes, timeline: Timeline | None = None
    ) -> None:
        """Upload what each micro-batch needs. Not collective.

        Args:
            encoder: The encoder, which only ranks of the first stage run.
            all_views: The views of this rank's units, in order.
            routes: This rank's side of the exchange, in which nothing crosses ranks.
            timeline: Where encodings are recorded, if they are.
        """
        self.timeline = timeline
        self.encoder, self.views, self.routes = encoder, all_views, routes
        views = np.array([len(unit.views) for unit in routes.units], np.int64)
        self.first_view = np.concatenate([[0], np.cumsum(views)]).astype(np.int64)
        self.micro_batch = np.array([unit.micro_batch for unit in routes.units], np.int64)
        self.indices = self._upload_indices()
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
        units = self._units(micro_batch)
        first, stop = int(self.first_view[units[0]]), int(self.first_view[units[-1] + 1])
        views = self.views.part(first, stop, self.encoder.vit.vision)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.answers_gradients):
            rows = EncoderPass(self.encoder, views).live_rows
            if self.timeline is not None:
                self.timeline.watch_encoder_backward(rows)
            assert len(rows) == self._num_rows(units) + 1, "the encoder makes other rows than the plan says"
            table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            base_rows, slot_rows, base_positions, slot_positions = self.indices[micro_batch, vpp]
            base, slots = take_rows(table, base_rows), take_rows(table, slot_rows)
        return visual_inputs(base, slots, base_positions, slot_positions)

    def _units(self, micro_batch: int) -> np.ndarray:
        return np.flatnonzero(self.micro_batch == micro_batch)

    def _num_rows(self, units: np.ndarray) -> int:
        return int(self.routes.first_rows[units[-1] + 1] - self.routes.first_rows[units[0]])

    def _upload_indices(self) -> dict[Key, list[torch.Tensor]]:
        """By chunk the table's rows that it takes, base and slots, and their positions; in one upload for the step."""
        arrays = []
        for (micro_batch, _), chunk in self.routes.chunks.items():
            index = self._table_index(self._units(micro_batch))
            arrays += [index[chunk.base_rows], index[chunk.slot_rows], chunk.base_positions, chunk.slot_positions]
        uploaded = upload_all(arrays)
        return {key: uploaded[4 * number : 4 * number + 4] for number, key in enumerate(self.routes.chunks)}

    def _table_index(self, units: np.ndarray) -> np.ndarray:
        """For each received row of the step, and the zero row after them, its row in this micro-batch's table."""
        num_rows = self._num_rows(units) + 1
        first = int(self.routes.first_rows[units[0]])
        newline = self.routes.num_local_rows - 1
        index = np.where(self.routes.send_rows == newline, num_rows - 1, self.routes.send_rows - first)
        return np.append(index, num_rows)
