"""Predicted against measured: once a run has done a hundred steps, a line compares them with its plan."""

from __future__ import annotations

import statistics
from typing import Final

from megatron_deepstack.data.order.stored_shapes import shapes_of_step
from megatron_deepstack.planning.budget.hardware import machine_of_device
from megatron_deepstack.planning.budget.run_plan import RunPlan, plan_run
from megatron_deepstack.platform.compute.device import device_name
from megatron_deepstack.training.metrics.record import StepRecord
from megatron_deepstack.training.session import Session

STEPS: Final = 100
"""Steps of this start after which the line is due."""


class Forecast:
    """Compares the steps of one start with what was predicted; rank 0 only."""

    def __init__(self, plan: RunPlan) -> None:
        """Take the plan of the run."""
        self.plan = plan
        self._seconds: list[float] = []

    @classmethod
    def of(cls, session: Session, first: int) -> Forecast:
        """Plan the run on this rank's device, with the samples of its first step.

        Args:
            session: The run.
            first: 0-based number of that step.

        Returns:
            The forecast.
        """
        shapes = shapes_of_step(session.reader, first)
        machine = machine_of_device(device_name())
        return cls(plan_run(session.recipe, shapes, machine, session.groups.axes.world_size))

    def take(self, record: StepRecord) -> str | None:
        """Take a step's record, and return the line when it is due."""
        self._seconds.append(record.step_seconds)
        if len(self._seconds) != STEPS:
            return None
        measured, predicted = statistics.median(self._seconds), self.plan.seconds.total
        text = (
            f"after {STEPS} steps: {predicted:.3g} s a step predicted, {measured:.3g} measured (median; measured / "
            f"predicted {measured / predicted:.2f})"
        )
        if self.plan.machine.is_cpu:
            return text + ". The planner's numbers are made for GPUs; of a CPU they are rough"
        memory = self.plan.stages[0].memory.total
        return text + f"; memory of rank 0 {memory / 1e9:.1f} GB predicted, {record.memory_bytes / 1e9:.1f} measured"
