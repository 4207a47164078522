"""The parts of the trial, in the order in which they run: what is most worth knowing first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part, which runs in a process of its own."""

    name: str
    title: str
    seconds: int
    """Its deadline."""
    entry: str = ""
    """`module.function` in this folder; `NAME.run` if empty."""
    on_cpu: bool = False
    """It sees no GPU, and runs beside the parts before the first one that needs it."""
    needs: tuple[str, ...] = ()
    """Parts that must have ended before; where one of them failed, this one says so itself."""

    @property
    def function(self) -> tuple[str, str]:
        """Module in this folder, and the function in it that takes settings and report."""
        module, _, function = (self.entry or f"{self.name}.run").partition(".")
        return module, function


PARTS: Final = (
    Part(name="cpu_numbers", title="the tiny cases on the CPU, for comparison", seconds=150, on_cpu=True),
    Part(name="environment", title="versions, page-locked memory, Transformer Engine", seconds=45),
    Part(name="ceilings", title="what the GPU can reach at best", seconds=40),
    Part(name="collectives", title="every collective of a step, one rank", seconds=40),
    Part(name="correctness", title="tiny cases against the CPU", seconds=75, needs=("cpu_numbers",)),
    Part(name="engine", title="Transformer Engine's layers against the CPU", seconds=60, needs=("cpu_numbers",)),
    Part(name="stage_local", title="a 7B stage, local layers", seconds=90, entry="stage_parts.run_local"),
    Part(
        name="stage_engine",
        title="a 7B stage, Transformer Engine's layers",
        seconds=90,
        entry="stage_parts.run_engine",
    ),
    Part(name="profile", title="one step of the 7B stage seen closely", seconds=60),
    Part(name="demo", title="draw, preprocess, train, stop, resume", seconds=90),
    Part(name="vision", title="vision tower and projector alone", seconds=40),
    Part(name="checkpoint", title="what a checkpoint costs training", seconds=60),
    Part(name="fp8", title="train in FP8, stop, resume", seconds=80, needs=("demo",), entry="demo.run_fp8"),
)
TOTAL_SECONDS: Final = 480
"""Longest time of a whole trial; parts for which no time is left are left out."""


def part_named(name: str) -> Part:
    """The part of that name."""
    return next(part for part in PARTS if part.name == name)


def with_needed(names: Sequence[str] | None) -> tuple[Part, ...]:
    """The named parts and those they need, in the order of the trial; all for None."""
    if names is None:
        return PARTS
    wanted = {*names, *(needed for name in names for needed in part_named(name).needs)}
    return tuple(part for part in PARTS if part.name in wanted)
