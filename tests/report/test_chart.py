"""Charts: what Bokeh is given to draw, and the numbers behind it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_deepstack.report.drawing.chart import Charts, Line, drawn_places, running_mean
from megatron_deepstack.report.drawing.svg import round_ticks


def models(charts: Charts, kind: str) -> list[dict[str, Any]]:
    """Attributes of all of Bokeh's models of a kind in the only chart, wherever they stand."""
    ((_, item),) = charts.items.items()
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("name") == kind and value.get("type") == "object":
                found.append(value.get("attributes", {}))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(item)
    return found


def test_every_line_shows_its_values_under_the_pointer_and_zooms_along_the_steps() -> None:
    charts = Charts()
    place = charts.lines([Line([(1, 0.5), (2, 0.25)], "#0072b2", "low", faint=[(1, 0.6), (2, 0.2)])], title="t")
    assert list(charts.items) == ["chart-1"]
    assert 'id="chart-1"' in place
    assert "low" in place
    (hover,) = models(charts, "HoverTool")
    assert [name for name, _ in hover["tooltips"]] == ["step", "low, mean", "low"]
    assert hover["mode"] == "vline"
    assert [tool.get("dimensions") for tool in models(charts, "BoxZoomTool")] == ["width"]
    json.dumps(charts.items, allow_nan=False)


def test_equal_lines_are_one_that_bears_all_names() -> None:
    rate = [(1, 1e-3), (2, 5e-4)]
    charts = Charts()
    place = charts.lines(
        [Line(rate, "#111111", "vision"), Line(rate, "#222222", "projector"), Line([(1, 1.0)], "#333333", "other")],
        title="t",
    )
    assert "vision, projector" in place
    assert len(models(charts, "HoverTool")) == 2


LOG = {
    "wide": ([(1, 5.0), (2, 0.01)], True, "LogAxis"),
    "narrow": ([(1, 5.0), (2, 1.0)], True, "LinearAxis"),
    "zero": ([(1, 5.0), (2, 0.0)], True, "LinearAxis"),
    "not asked for": ([(1, 5.0), (2, 0.01)], False, "LinearAxis"),
}


@pytest.mark.parametrize(("points", "log", "axis"), LOG.values(), ids=LOG)
def test_losses_that_fall_far_get_a_logarithmic_axis(points: list[tuple[float, float]], log: bool, axis: str) -> None:
    charts = Charts()
    charts.lines([Line(points, "#111111")], title="t", log=log)
    assert len(models(charts, axis)) == (2 if axis == "LinearAxis" else 1)


def test_resumptions_are_marked() -> None:
    charts = Charts()
    charts.lines([Line([(1, 1.0), (9, 2.0)], "#111111")], title="t", marks=[(4, "resumed")])
    assert [span["location"] for span in models(charts, "Span")] == [4]
    assert [label["text"] for label in models(charts, "Label")] == ["resumed"]


def test_areas_stand_on_each_other_and_show_all_parts() -> None:
    charts = Charts()
    charts.areas([("a", "#000000", [(1, 1.0), (2, 2.0)]), ("b", "#111111", [(1, 3.0), (2, 1.0)])], title="t")
    (hover,) = models(charts, "HoverTool")
    assert [name for name, _ in hover["tooltips"]] == ["step", "a", "b", "in all"]
    assert {area["y1"]["field"] for area in models(charts, "VArea")} == {"low0", "low1"}


@pytest.mark.parametrize(
    "drawn", [lambda charts: charts.lines((), title="t"), lambda charts: charts.areas((), title="t")]
)
def test_without_values_there_is_no_chart(drawn: Any) -> None:
    charts = Charts()
    assert "no values were recorded" in drawn(charts)
    assert charts.items == {}


def test_a_long_run_is_drawn_with_few_points_and_all_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[7, 31_415]] = -50, 50
    places = list(drawn_places(values.tolist()))
    assert 1000 < len(places) <= 2000
    assert {0, 7, 31_415, 99_999} <= set(places)
    assert list(drawn_places([1.0] * 2000)) == list(range(2000))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (1, 1), (-3, 4), (0.1203, 3.2), (1e-9, 2e-9), (1e8, 1e8 + 1), (5, 5 + 1e-14)]
)
def test_ticks_enclose_the_values_and_are_few(low, high):
    ticks = round_ticks(low, high)
    assert ticks[0] <= low + abs(low) * 1e-9
    assert ticks[-1] >= high - abs(high) * 1e-9
    assert 2 <= len(ticks) <= 8


def test_running_mean_keeps_length_and_constants():
    points = [(step, 2.0) for step in range(100)]
    assert running_mean(points) == points
    assert running_mean([]) == []


@pytest.mark.parametrize("num", [1, 2, 3, 61, 180, 1001])
def test_running_mean_is_that_of_the_values_around(num):
    """To rounding (worst measured 1e-15), also after one value beside which all others vanish."""
    values = np.random.default_rng(num).lognormal(size=num)
    values[num // 3] = 1e30
    half = max(1, num // 60)
    near = [values[max(0, index - half) : index + half + 1] for index in range(num)]
    means = running_mean(list(enumerate(values.tolist())))
    assert [step for step, _ in means] == list(range(num))
    assert [mean for _, mean in means] == pytest.approx([part.mean() for part in near], rel=1e-13)
