"""Line and area charts by Bokeh: they show values under the pointer, and zoom along the steps.

A page holds Bokeh's script once and each chart as JSON, so that it is one file that needs no network. Measured with
five charts of 480 steps: a page has 1.34 MB, of which 1.27 MB are the script; Plotly's script alone has 4.8 MB. Bokeh
needs no `eval` for these charts, so the page's policy can forbid it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_deepstack.report.drawing.svg import Markup, element

Point = tuple[float, float]

_HEIGHT: Final = 270
_MOST_DRAWN: Final = 2000
"""Largest number of points drawn in a line; this is more than two for each pixel."""
_GREY: Final = "#7b8794"
"""Colour of text and axes, which can be read both on a light and on a dark page."""
_LOG_FROM: Final = 50.0
"""Above this ratio of the largest to the smallest value an axis is logarithmic, if that is asked for."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: points (step, value) in order of steps, only finite values."""

    points: Sequence[Point]
    colour: str
    label: str = ""
    faint: Sequence[Point] = ()
    """The raw values of which `points` are a mean; they are drawn behind the line."""


class Charts:
    """The charts of one page: each call returns the place for a chart, and `items` holds its content."""

    def __init__(self) -> None:
        self.items: dict[str, Mapping[str, Any]] = {}
        """Bokeh's JSON by the `id` of its place."""

    def lines(
        self, lines: Sequence[Line], *, title: str, marks: Sequence[tuple[float, str]] = (), log: bool = False
    ) -> Markup:
        """Lines over the same steps, with a legend if they have labels.

        Args:
            lines: Lines with equal points are drawn as one, with all their labels.
            title: Describes the chart to those who cannot see it.
            marks: Steps to mark, each with its label.
            log: Whether the axis may be logarithmic; it is if all values are positive and differ by a factor above 50.

        Returns:
            The place for the chart, or a sentence if there are no values.
        """
        drawn = _merged([line for line in lines if line.points])
        if not drawn:
            return _nothing()
        values = [value for line in drawn for _, value in (*line.points, *line.faint)]
        as_log = log and min(values) > 0 and max(values) > _LOG_FROM * min(values)
        figure = _figure(log=as_log)
        for line in drawn:
            _draw_line(figure, line)
        _draw_marks(figure, marks)
        return self._place(figure, title, [(line.label, line.colour) for line in drawn if line.label])

    def areas(self, parts: Sequence[tuple[str, str, Sequence[Point]]], *, title: str) -> Markup:
        """Areas on top of each other, from 0 up.

        Args:
            parts: Label, colour and points of each part, all over the same steps.
            title: Describes the chart to those who cannot see it.

        Returns:
            The place for the chart, or a sentence if there are no values.
        """
        steps = [step for step, _ in parts[0][2]] if parts else []
        if not steps:
            return _nothing()
        table = np.array([[value for _, value in points] for _, _, points in parts], dtype=np.float64)
        tops = table.cumsum(axis=0)
        shown = list(drawn_places(tops[-1].tolist()))
        figure = _figure()
        columns = {"step": np.array(steps, dtype=np.float64)[shown], "all": tops[-1][shown]}
        for number, (below, above) in enumerate(zip(np.vstack([0 * tops[:1], tops[:-1]]), tops, strict=True)):
            columns |= {
                f"low{number}": below[shown],
                f"high{number}": above[shown],
                f"part{number}": table[number][shown],
            }
        source = _source(columns)
        for number, (_, colour, _) in enumerate(parts):
            figure.varea("step", f"low{number}", f"high{number}", source=source, fill_color=colour, fill_alpha=0.85)
        top = figure.line("step", "all", source=source, line_alpha=0)
        tooltips = [(label, f"@part{number}{{0.0000}} s") for number, (label, _, _) in enumerate(parts)]
        _add_hover(figure, [top], [("step", "@step{0,0}"), *tooltips, ("in all", "@all{0.0000} s")])
        figure.y_range.start = 0
        return self._place(figure, title, [(label, colour) for label, colour, _ in parts])

    def _place(self, figure: Any, title: str, legend: Sequence[tuple[str, str]]) -> Markup:
        from bokeh.core.types import ID
        from bokeh.embed import json_item

        name = f"chart-{len(self.items) + 1}"
        self.items[name] = json_item(figure, ID(name))
        entries = [element("span", element("i", style=f"background: {colour}"), label) for label, colour in legend]
        place = element("div", id=name, class_="chart", role="img", aria_label=title)
        return element("div", *([element("p", *entries, class_="legend")] if entries else []), place)


def library_script() -> str:
    """The content of Bokeh's own script."""
    import bokeh

    file = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return file.read_text(encoding="utf-8")


def _nothing() -> Markup:
    return element("p", "no values were recorded")


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Lines with the same points as one line, since otherwise only the last of them would be visible."""
    found: dict[tuple[Point, ...], Line] = {}
    for line in lines:
        key = tuple(line.points)
        if key in found and line.label:
            first = found[key]
            found[key] = Line(first.points, first.colour, f"{first.label}, {line.label}", first.faint)
        else:
            found[key] = line
    return list(found.values())


def _figure(*, log: bool = False) -> Any:
    """An empty chart whose colours suit a light and a dark page."""
    from bokeh.plotting import figure

    chart = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        tools="xbox_zoom,reset",
        toolbar_location="right",
        y_axis_type="log" if log else "linear",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        x_axis_label="step",
    )
    chart.toolbar.logo = None
    for axis in (*chart.xaxis, *chart.yaxis):
        axis.axis_line_color = axis.major_tick_line_color = _GREY
        axis.minor_tick_line_color = None
        axis.major_label_text_color = axis.axis_label_text_color = _GREY
        axis.axis_label_text_font_style = "normal"
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
    for grid in (*chart.xgrid, *chart.ygrid):
        grid.grid_line_color, grid.grid_line_alpha = _GREY, 0.25
    chart.xgrid.grid_line_color = None
    return chart


def _source(columns: Mapping[str, Any]) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(dict(columns))


def _draw_line(figure: Any, line: Line) -> None:
    """Draw the raw values, if there are any, and the line over them; the pointer shows both."""
    name = line.label or "value"
    if line.faint:
        figure.line("step", "value", source=_source(_columns(line.faint)), color=line.colour, alpha=0.3)
    columns = _columns(line.points)
    tooltips = [("step", "@step{0,0}"), (f"{name}, mean" if line.faint else name, "@value{0.0000 a}")]
    if len(line.faint) == len(line.points) > 0:
        places = list(drawn_places([value for _, value in line.points]))
        columns["raw"] = np.array([value for _, value in line.faint], dtype=np.float64)[places]
        tooltips.append((name, "@raw{0.0000 a}"))
    if max(abs(value) for _, value in line.points) < 0.01:
        tooltips = [(label, form.replace("{0.0000 a}", "{0.00e+0}")) for label, form in tooltips]
    drawn = figure.line("step", "value", source=_source(columns), color=line.colour, line_width=2.5, line_join="round")
    if len(line.points) == 1:
        drawn = figure.scatter("step", "value", source=_source(columns), color=line.colour, size=8)
    _add_hover(figure, [drawn], tooltips)


def _columns(points: Sequence[Point]) -> dict[str, Any]:
    places = list(drawn_places([value for _, value in points]))
    chosen = np.array([points[place] for place in places], dtype=np.float64)
    return {"step": chosen[:, 0], "value": chosen[:, 1]}


def _add_hover(figure: Any, renderers: Sequence[Any], tooltips: Sequence[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    figure.add_tools(HoverTool(renderers=list(renderers), tooltips=list(tooltips), mode="vline", visible=False))


def _draw_marks(figure: Any, marks: Sequence[tuple[float, str]]) -> None:
    from bokeh.models.annotations import Label, Span

    for step, label in marks:
        figure.add_layout(Span(location=step, dimension="height", line_color=_GREY, line_dash="dashed"))
        figure.add_layout(
            Label(
                text=label,
                text_color=_GREY,
                text_font_size="12px",
                x=step,
                y=_HEIGHT - 70,
                y_units="screen",
                x_offset=5,
            )
        )


def drawn_places(values: Sequence[float]) -> Sequence[int]:
    """Choose the values to draw.

    Args:
        values: All values of a line.

    Returns:
        Their places: all of them, or, if there are very many, the first, the last, and the lowest and highest of each
        part of the line.
    """
    if len(values) <= _MOST_DRAWN:
        return range(len(values))
    places = {0, len(values) - 1}
    stretches = _MOST_DRAWN // 2 - 1
    for number in range(stretches):
        stretch = range(len(values) * number // stretches, len(values) * (number + 1) // stretches)
        places |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(places)


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Replace each value by the mean of those around it, about a thirtieth of all; fewer at the ends.

    The time grows linearly with the number of points: a window of `width` values is the end of one block of that length
    and the beginning of the next. Differences of running sums would be as fast, but they lose small values beside one
    huge value.
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
