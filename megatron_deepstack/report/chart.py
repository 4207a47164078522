"""Line charts as SVG: axes with round numbers, strong lines, and if wanted a faint one behind each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_deepstack.report.svg import FAINT, LINE, Markup, drawing, element, text

_WIDTH, _HEIGHT = 900, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40
_MOST_DRAWN = 2000
"""Points of a line, more than two a pixel."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """Value ranges of the plotting area."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (_HEIGHT - _TOP - _BOTTOM)


Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One line: points (step, value) in order of steps, finite values only."""

    points: Sequence[Point]
    colour: str
    label: str = ""
    faint: Sequence[Point] = ()
    """Drawn behind them: the raw values of which `points` are a mean."""


def line_chart(lines: Sequence[Line], *, title: str, marks: Sequence[tuple[float, str]] = ()) -> Markup:
    """Lines over the same steps, with a legend where they have labels; `marks` are labelled steps."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return drawing(_WIDTH, 60, title, text(_WIDTH / 2, 35, "no values were recorded", fill=FAINT))
    values = [value for line in drawn for _, value in (*line.points, *line.faint)]
    first = min(line.points[0][0] for line in drawn)
    last = max(line.points[-1][0] for line in drawn)
    ticks = round_ticks(min(values), max(values))
    axes = _Axes(first, max(last, first + 1), ticks[0], ticks[-1])
    return drawing(
        _WIDTH,
        _HEIGHT,
        title,
        *_grid(axes, ticks),
        *_marks(axes, marks),
        *(_line(axes, line.faint, line.colour, width=1, opacity=0.3) for line in drawn),
        *(_line(axes, line.points, line.colour, width=2.5, opacity=1) for line in drawn),
        *_legend([(line.label, line.colour) for line in drawn if line.label]),
    )


def stacked_chart(parts: Sequence[tuple[str, str, Sequence[Point]]], *, title: str) -> Markup:
    """Areas on top of each other: (label, colour, points) of each part, all over the same steps, values from 0 up."""
    steps = [step for step, _ in parts[0][2]] if parts else []
    if not steps:
        return line_chart((), title=title)
    tops = [[0.0] * len(steps)]
    for _, _, points in parts:
        tops.append([below + value for below, (_, value) in zip(tops[-1], points, strict=True)])
    ticks = round_ticks(0.0, 1.2 * max(tops[-1]))  # room for the legend
    axes = _Axes(steps[0], max(steps[-1], steps[0] + 1), 0.0, ticks[-1])
    drawn = _drawn(tops[-1])
    steps, tops = [steps[index] for index in drawn], [[top[index] for index in drawn] for top in tops]
    areas = [
        _area(axes, steps, low, high, colour)
        for low, high, (_, colour, _) in zip(tops[:-1], tops[1:], parts, strict=True)
    ]
    legend = _legend([(label, colour) for label, colour, _ in parts])
    return drawing(_WIDTH, _HEIGHT, title, *_grid(axes, ticks), *areas, *legend)


def _area(axes: _Axes, steps: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> Markup:
    there = [f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in zip(steps, high, strict=True)]
    back = [f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in zip(steps, low, strict=True)]
    return element("polygon", points=" ".join([*there, *reversed(back)]), fill=colour, fill_opacity=0.85)


def _legend(entries: Sequence[tuple[str, str]]) -> list[Markup]:
    """Right-aligned in the first line of the chart, a second where they do not fit."""
    parts, x, y = [], float(_WIDTH - _RIGHT), float(_TOP)
    for label, colour in reversed(entries):
        width = 30 + 6.6 * len(label)
        if x - width < _LEFT:
            x, y = float(_WIDTH - _RIGHT), y + 17
        x -= width
        parts.append(element("rect", x=max(x, 0), y=y - 6, width=12, height=12, rx=2, fill=colour))
        parts.append(text(max(x, 0) + 17, y + 4, label, text_anchor="start", fill=FAINT))
    return parts


def _grid(axes: _Axes, ticks: Sequence[float]) -> list[Markup]:
    parts = []
    for tick in ticks:
        y = axes.y(tick)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, stroke=LINE, stroke_width=0.6))
        parts.append(text(_LEFT - 8, y + 4, _tick(tick), text_anchor="end", fill=FAINT))
    for tick in round_ticks(axes.low_x, axes.high_x, count=8):
        if axes.low_x <= tick <= axes.high_x and tick == int(tick):
            parts.append(text(axes.x(tick), _HEIGHT - _BOTTOM + 18, f"{int(tick)}", fill=FAINT))
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "step", fill=FAINT))
    return parts


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def _marks(axes: _Axes, marks: Sequence[tuple[float, str]]) -> list[Markup]:
    parts = []
    for step, label in marks:
        x = axes.x(step)
        parts.append(
            element(
                "line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, stroke=FAINT, stroke_width=1, stroke_dasharray="4 4"
            )
        )
        parts.append(text(x + 6, _TOP + 12, label, text_anchor="start", fill=FAINT))
    return parts


def _drawn(values: Sequence[float]) -> Sequence[int]:
    """Places of the values to draw: all, or of very many the first, the last, and each stretch's lowest and highest."""
    if len(values) <= _MOST_DRAWN:
        return range(len(values))
    places = {0, len(values) - 1}
    stretches = _MOST_DRAWN // 2 - 1
    for number in range(stretches):
        stretch = range(len(values) * number // stretches, len(values) * (number + 1) // stretches)
        places |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(places)


def _line(axes: _Axes, points: Sequence[Point], colour: str, *, width: float, opacity: float) -> Markup:
    shown = (points[index] for index in _drawn([value for _, value in points]))
    path = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in shown)
    return element(
        "polyline",
        points=path,
        fill="none",
        stroke=colour,
        stroke_width=width,
        stroke_opacity=opacity,
        stroke_linejoin="round",
    )


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Each value replaced by the mean of about a thirtieth of all around it; at the ends, of what there is.

    Takes time in proportion to the points: a window of `width` values is the end of one block of that many and the
    beginning of the next. Differences of sums over all would do too, but lose what is small beside one huge value.
    """
    half, last = max(1, len(points) // 60), len(points) - 1
    width = 2 * half + 1
    values = [0.0] * half + [value for _, value in points] + [0.0] * half
    begins: list[float] = []
    ends: list[float] = []
    for first in range(0, len(values), width):
        block = values[first : first + width]
        begins += accumulate(block)
        ends += reversed([*accumulate(reversed(block))])
    means = []
    for index, (step, _) in enumerate(points):
        total = begins[index + width - 1] + (ends[index] if index % width else 0.0)
        means.append((step, total / (min(index, half) + 1 + min(last - index, half))))
    return means


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that enclose low and high."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    unit = 10 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= count)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [index * step for index in range(first, last + 1)]
