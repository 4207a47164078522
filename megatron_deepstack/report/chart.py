"""A line chart as SVG: axes with round numbers, a strong line, and if wanted a faint one behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepstack.report.svg import FAINT, LINE, Markup, drawing, element, text

_WIDTH, _HEIGHT = 900, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 40


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


def line_chart(
    points: Sequence[Point],
    *,
    title: str,
    colour: str,
    faint: Sequence[Point] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Points (step, value) in order of steps, finite values only.

    `faint` is drawn behind them (the raw values of which `points` are a mean); `marks` are labelled steps.
    """
    if not points:
        return drawing(_WIDTH, 60, title, text(_WIDTH / 2, 35, "no values were recorded", fill=FAINT))
    values = [value for _, value in (*points, *faint)]
    ticks = round_ticks(min(values), max(values))
    axes = _Axes(points[0][0], max(points[-1][0], points[0][0] + 1), ticks[0], ticks[-1])
    return drawing(
        _WIDTH,
        _HEIGHT,
        title,
        *_grid(axes, ticks),
        *_marks(axes, marks),
        _line(axes, faint, colour, width=1, opacity=0.35),
        _line(axes, points, colour, width=2.5, opacity=1),
    )


def _grid(axes: _Axes, ticks: Sequence[float]) -> list[Markup]:
    parts = []
    for tick in ticks:
        y = axes.y(tick)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, stroke=LINE, stroke_width=0.6))
        parts.append(text(_LEFT - 8, y + 4, f"{tick:.4g}", text_anchor="end", fill=FAINT))
    for tick in round_ticks(axes.low_x, axes.high_x, count=8):
        if axes.low_x <= tick <= axes.high_x and tick == int(tick):
            parts.append(text(axes.x(tick), _HEIGHT - _BOTTOM + 18, f"{int(tick)}", fill=FAINT))
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "step", fill=FAINT))
    return parts


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


def _line(axes: _Axes, points: Sequence[Point], colour: str, *, width: float, opacity: float) -> Markup:
    path = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in points)
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
    """Each value replaced by the mean of about a thirtieth of all around it; at the ends, of what there is."""
    half = max(1, len(points) // 60)
    means = []
    for index, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, index - half) : index + half + 1]]
        means.append((step, sum(near) / len(near)))
    return means


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that enclose low and high."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    unit = 10 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= count)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [index * step for index in range(first, last + 1)]
