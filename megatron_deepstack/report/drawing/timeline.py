"""A recorded step as a drawing: ranks as rows, time to the right, each box one action of a rank.

Numbers on boxes are micro-batches. Encoder and decoder have different colours, which shows where the encoder works: at
both ends of the step on every rank (`spread`), or inside the first stage's passes (`inline`). Empty space within the
schedule is time for waiting for a neighbour and for sending to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import DataError
from megatron_deepstack.report.drawing.svg import FAINT, LINE, Markup, drawing, element, rect, round_ticks, text

_WIDTH, _LEFT, _RIGHT = 1000.0, 118.0, 74.0
_TOP, _ROW, _GAP, _BOTTOM = 40.0, 30.0, 9.0, 40.0
_MOST_ROWS = 16
"""If there are more ranks, only one rank of each stage is drawn."""

COLOURS = {
    "data": "#9aa5b1",
    "encode": "#e69f00",
    "route": "#cc79a7",
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "route back": "#cc79a7",
    "encoder backward": "#d55e00",
    "finalise": "#8c6bb1",
    "optimizer": "#009e73",
}
_LEGEND = (
    ("encode", "encoder forward"),
    ("encoder backward", "encoder backward"),
    ("forward", "decoder forward"),
    ("backward", "decoder backward"),
    ("route", "exchange of rows"),
    ("finalise", "gradient reduction"),
    ("optimizer", "optimizer"),
    ("data", "waiting for data"),
)
_SCHEDULE = "schedule"


@dataclass(frozen=True, slots=True)
class Bar:
    """One action of a rank; times are seconds from the beginning of the step."""

    kind: str
    micro_batch: int | None
    vpp: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class RankLine:
    """The actions of one rank."""

    rank: int
    label: str
    stage: int
    boxes: tuple[Bar, ...]
    schedule: tuple[float, float]
    """When its schedule began and ended."""

    @property
    def idle(self) -> float:
        """The share of the schedule in which no pass ran: the pipeline's bubble, and sending."""
        begin, end = self.schedule
        busy = sum(box.end - box.begin for box in self.boxes if begin <= box.begin and box.end <= end)
        return max(0.0, 1 - busy / (end - begin)) if end > begin else 0.0


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One recorded step with all its ranks."""

    step: int
    placement: str
    clock_error: float
    """Seconds by which ranks on different machines may be shifted against each other."""
    lines: tuple[RankLine, ...]

    @property
    def seconds(self) -> float:
        """The time from the beginning of the step to the end of its last action."""
        return max(box.end for line in self.lines for box in line.boxes)

    @property
    def idle(self) -> float:
        """The mean idle share over all ranks."""
        return sum(line.idle for line in self.lines) / len(self.lines)


def read_timelines(run: Path) -> list[RecordedStep]:
    """The recorded steps of a run, in order. Raises DataError if a file is damaged."""
    steps = []
    for file in RunFolder(run).timelines():
        try:
            steps.append(_recorded(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: is no recorded step ({error!r}); remove the file to go on") from error
    return sorted(steps, key=lambda step: step.step)


def _recorded(document: Mapping[str, Any]) -> RecordedStep:
    lines = tuple(_line(rank, document["ranks"]) for rank in document["ranks"])
    return RecordedStep(
        step=int(document["step"]),
        placement=str(document["encoder_placement"]),
        clock_error=float(document["clock_error_seconds"]),
        lines=tuple(sorted(lines, key=lambda line: (line.stage, line.rank))),
    )


def _line(rank: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> RankLine:
    boxes = [Bar(kind, micro, vpp, begin, end) for kind, micro, vpp, begin, end in rank["intervals"]]
    axes = [axis for axis in ("dp", "cp", "tp") if any(other[axis] for other in ranks)]
    label = ", ".join([f"stage {rank['pp']}", *(f"{axis} {rank[axis]}" for axis in axes)])
    schedules = [(box.begin, box.end) for box in boxes if box.kind == _SCHEDULE] or [(0.0, 0.0)]
    shown = tuple(box for box in boxes if box.kind in COLOURS)
    return RankLine(rank["rank"], label, rank["pp"], shown, schedules[0])


def timeline_drawing(step: RecordedStep, *, seconds: float | None = None) -> Markup:
    """Draw one recorded step.

    Args:
        step: The step.
        seconds: The time that the whole width stands for; None takes the step's own time.

    Returns:
        The drawing.
    """
    lines = _chosen(step.lines)
    scale = (_WIDTH - _LEFT - _RIGHT) / (seconds or step.seconds)
    height = _TOP + len(lines) * (_ROW + _GAP) + _BOTTOM
    chunks = max((box.vpp for line in lines for box in line.boxes), default=0) + 1
    parts = [_legend(), *_grid(seconds or step.seconds, scale, height)]
    parts.append(text(_WIDTH - _RIGHT + 8, _TOP - 8, "idle", text_anchor="start", size=11, fill=FAINT))
    for number, line in enumerate(lines):
        parts += _row(line, _TOP + number * (_ROW + _GAP), scale, chunks)
    title = f"Step {step.step}, encoder {step.placement}: what each of {len(lines)} ranks did when"
    return drawing(_WIDTH, height, title, *parts)


def _chosen(lines: Sequence[RankLine]) -> list[RankLine]:
    if len(lines) <= _MOST_ROWS:
        return list(lines)
    first = {line.stage: line for line in reversed(lines)}
    return [first[stage] for stage in sorted(first)]


def _legend() -> Markup:
    parts, x = [], 20.0
    for kind, words in _LEGEND:
        parts.append(rect(x, 6, 11, 11, fill=COLOURS[kind], rx=2))
        parts.append(text(x + 15, 15.5, words, size=11, fill=FAINT, text_anchor="start"))
        x += 29 + 5.9 * len(words)
    return element("g", *parts)


def _grid(seconds: float, scale: float, height: float) -> list[Markup]:
    """Vertical lines at round times."""
    unit, name = (1e3, "ms") if seconds < 2 else (1.0, "s")
    parts = []
    for tick in round_ticks(0.0, seconds * unit, count=8):
        x = _LEFT + tick / unit * scale
        if x <= _WIDTH - _RIGHT + 1:
            parts.append(element("line", x1=x, x2=x, y1=_TOP - 4, y2=height - _BOTTOM, stroke=LINE, stroke_width=0.6))
            parts.append(text(x, height - _BOTTOM + 16, f"{tick:g}", size=11, fill=FAINT))
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, name, size=11, fill=FAINT))
    return parts


def _row(line: RankLine, y: float, scale: float, chunks: int) -> list[Markup]:
    begin, end = line.schedule
    middle = y + _ROW / 2
    parts = [
        text(_LEFT - 10, middle - 2, f"rank {line.rank}", size=12, text_anchor="end", font_weight="600"),
        text(_LEFT - 10, middle + 11, line.label, size=10, text_anchor="end", fill=FAINT),
        rect(_LEFT + begin * scale, y, (end - begin) * scale, _ROW, fill=LINE, fill_opacity=0.35, rx=2),
        text(_WIDTH - _RIGHT + 8, middle + 4, f"{line.idle:.0%}", text_anchor="start", size=12, fill=FAINT),
    ]
    return parts + [_box(box, y, scale, chunks) for box in sorted(line.boxes, key=lambda box: box.begin)]


def _box(box: Bar, y: float, scale: float, chunks: int) -> Markup:
    """A box; later chunks of a stage are lower and fainter, so that passes of two chunks can be distinguished."""
    x, width = _LEFT + box.begin * scale, (box.end - box.begin) * scale
    of_micro_batch = box.micro_batch is not None
    inset = 5.0 * box.vpp / max(chunks - 1, 1) if chunks > 1 and box.kind in ("forward", "backward") else 0.0
    opacity = 1.0 - 0.35 * box.vpp / max(chunks - 1, 1)
    about = f"{box.kind}{f' of micro-batch {box.micro_batch}' if of_micro_batch else ''}"
    about += f", chunk {box.vpp}" if chunks > 1 and box.kind in ("forward", "backward") else ""
    label = f"{about}: {(box.end - box.begin) * 1e3:.2f} ms from {box.begin * 1e3:.2f}"
    parts = [
        rect(
            x,
            y + inset,
            max(width, 0.6),
            _ROW - inset,
            fill=COLOURS[box.kind],
            fill_opacity=opacity,
            rx=min(2, width / 4),
        )
    ]
    number = f"{box.micro_batch}"
    if of_micro_batch and width > 6.2 * len(number) + 3:
        parts.append(text(x + width / 2, y + _ROW / 2 + inset / 2 + 4, number, size=11, fill=_ink(box.kind)))
    return element("g", element("title", label), *parts)


def _ink(kind: str) -> str:
    return "#102a43" if kind in ("forward", "encode") else "#ffffff"
