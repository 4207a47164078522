"""Steps made ready ahead of time: planned, read, and on their way to the device before the loop asks for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_deepstack.data.order.prefetch import Loads
from megatron_deepstack.data.order.steps import LoadedStep
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.staging import StagedStep


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step with its data on the way to the device."""

    loaded: LoadedStep
    staged: StagedStep

    def with_plan_of(self, loaded: LoadedStep, engine: Engine) -> ReadyStep:
        """This step as it was changed after it was made ready.

        Args:
            loaded: The step, of which samples may have been left out.
            engine: This rank's model and groups.

        Returns:
            The step, whose data is sent again if its plan is another.
        """
        if loaded.plan is self.staged.plan:
            return replace(self, loaded=loaded)
        return ready(loaded, engine)


def ready(loaded: LoadedStep, engine: Engine) -> ReadyStep:
    """Begin to send a step's data to the device. Not collective; any thread may do so.

    Args:
        loaded: The step.
        engine: This rank's model and groups.

    Returns:
        The step with its data on the way.
    """
    return ReadyStep(loaded, StagedStep(engine, loaded.plan, torch.from_numpy(loaded.pixels)))


@dataclass(frozen=True, slots=True)
class ReadySteps:
    """Steps of a reader, each sent to the device once it is read."""

    reader: Loads[LoadedStep]
    engine: Engine

    def load(self, step: int) -> ReadyStep:
        """Plan, read and send one step.

        Args:
            step: 0-based.

        Returns:
            The step of this rank.

        Raises:
            StoreError: As the reader raises it.
            DataError: As the reader raises it.
        """
        return ready(self.reader.load(step), self.engine)
