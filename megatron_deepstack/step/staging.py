"""What a step needs on the device besides the model: pixels, tokens, labels, positions and indices, as one transfer.

`StagedStep` gathers all of it in one page-locked buffer and begins the transfer on a stream of its own. A training run
does so in the thread that prepares steps, so that the next step's data arrives while this one computes, and the thread
that launches kernels neither arranges nor copies anything. Without a GPU the same happens without page-locking.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.model.vision.views import Views
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.platform.compute.upload import Upload
from megatron_deepstack.routing.exchange import ExchangeIndex, index_arrays
from megatron_deepstack.step import inline
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.schedule import micro_batch_arrays
from megatron_deepstack.step.visual import position_arrays


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's data on the device."""

    views: Views
    """The views of this rank's units."""
    micro_batches: list[torch.Tensor]
    """As `schedule.micro_batch_arrays` orders them."""
    exchange: ExchangeIndex | None
    """None where the encoder runs inline, and nothing is exchanged."""
    rows: list[torch.Tensor]
    """Positions of rows as `visual.position_arrays` orders them; inline, what `inline.index_arrays` gives."""


class StagedStep:
    """A step's data on their way to the device."""

    def __init__(self, engine: Engine, plan: StepPlan, pixels: torch.Tensor) -> None:
        """Gather the data and begin the transfer. Not collective; any thread may do so.

        Args:
            engine: This rank's model and groups; only its layout is looked at.
            plan: The step of this rank's replica, as this rank has it.
            pixels: As for `forward_backward`.
        """
        place = engine.groups.place
        inside = engine.parallel.encoder_placement is EncoderPlacement.INLINE
        kinds = [
            micro_batch_arrays(plan, engine.model.config, cp_rank=place.cp, tp_rank=place.tp),
            [] if inside else index_arrays(plan.routes),
            inline.index_arrays(plan.routes) if inside else position_arrays(plan.routes.chunks.values()),
        ]
        self.plan = plan
        self._sizes = [len(arrays) for arrays in kinds]
        whole = [torch.from_numpy(np.array(array, np.int64)) for arrays in kinds for array in arrays]
        self._upload = Upload([pixels, *whole])

    def take(self) -> StepInputs:
        """The data on the device; what is computed with them waits for the transfer.

        Returns:
            The step's data.
        """
        pixels, *whole = self._upload.take()
        remaining = iter(whole)
        batches, exchange, rows = (list(islice(remaining, size)) for size in self._sizes)
        return StepInputs(
            views=views_of(self.plan, pixels),
            micro_batches=batches,
            exchange=ExchangeIndex(*exchange) if exchange else None,
            rows=rows,
        )


def views_of(plan: StepPlan, pixels: torch.Tensor) -> Views:
    """Put together pixels and what the plan knows of them.

    Args:
        plan: The step of this rank's replica, as this rank has it.
        pixels: The views of its units, in order, as for `train_step.forward_backward`.

    Returns:
        The views, with the patches of each of them if they may have any size.
    """
    grids = tuple(unit.grid for unit in plan.routes.units if unit.grid is not None)
    return Views(pixels, grids if grids or pixels.ndim == 1 else None)
