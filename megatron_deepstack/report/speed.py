"""How fast a run was and how its time was spent, as charts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from megatron_deepstack.platform.quantity import flop_rate, flop_scale
from megatron_deepstack.report.drawing.chart import Charts, Line, Point, running_mean
from megatron_deepstack.report.drawing.frame import wide_drawing
from megatron_deepstack.report.drawing.svg import FAINT, Markup, drawing, element, rect, text
from megatron_deepstack.report.drawing.timeline import COLOURS, RecordedStep, timeline_drawing
from megatron_deepstack.report.records import Metrics

PARTS = {
    "data": COLOURS["data"],
    "encode": COLOURS["encode"],
    "route": COLOURS["route"],
    "schedule": COLOURS["forward"],
    "route back": "#b86a93",
    "encoder backward": COLOURS["encoder backward"],
    "finalise": COLOURS["finalise"],
    "optimizer": COLOURS["optimizer"],
    "other": "#d8d2c4",
}
"""Parts of a step in their order, with their colours; `other` is the time that the clock does not assign to a part."""


def median(metrics: Metrics, name: str) -> float | None:
    """The median of a recorded quantity.

    Args:
        metrics: The metrics of a run.
        name: Name of the quantity in `metrics.jsonl`.

    Returns:
        The median over the steps in the quantity's own unit, or None if it was never recorded.
    """
    values = [value for _, value in metrics.series(name)]
    return statistics.median(values) if values else None


def seconds_by_part(metrics: Metrics) -> dict[str, list[Point]]:
    """The time of each part of a step.

    Returns:
        For each part that takes any time, pairs of step and seconds; all parts together make the step's time.
    """
    parts: dict[str, list[Point]] = {name: [] for name in PARTS}
    for record in metrics.records:
        total, named = record.get("step_seconds"), record.get("seconds") or {}
        if not isinstance(total, int | float) or not named:
            continue
        for name, points in parts.items():
            rest = max(total - sum(named.values()), 0.0)
            points.append((record["step"], rest if name == "other" else float(named.get(name, 0.0))))
    return {name: points for name, points in parts.items() if any(value for _, value in points)}


def speed_section(metrics: Metrics, charts: Charts) -> Iterator[Markup]:
    """Tokens per second, model FLOP/s or their share of the peak, and time by part.

    Args:
        metrics: The metrics of a run.
        charts: What draws the charts of the page.

    Yields:
        A heading and a chart for each quantity that was recorded.
    """
    tokens = metrics.series("tokens_per_second")
    yield element("h3", "tokens per second")
    line = Line(running_mean(tokens), "#0072b2", "tokens/s", faint=tokens)
    yield charts.lines([line], title="Tokens per second by step")
    shares = [(step, 100 * value) for step, value in metrics.series("mfu")]
    flops = metrics.series("tflops_per_second_per_rank")
    if shares:
        yield element("h3", "MFU, percent")
        yield charts.lines([Line(running_mean(shares), "#009e73", "MFU, %", faint=shares)], title="MFU by step")
    elif flops:
        _, unit = flop_rate(max(value for _, value in flops))
        scale = flop_scale(unit)
        points = [(step, value * scale) for step, value in flops]
        yield element("h3", f"model {unit} a rank")
        line = Line(running_mean(points), "#009e73", unit, faint=points)
        yield charts.lines([line], title=f"Model {unit} a rank by step")
    yield from _waste(metrics, charts)
    if parts := seconds_by_part(metrics):
        yield element("h3", "seconds of a step, by part, on rank 0")
        areas = [(_with_share(name, parts), PARTS[name], running_mean(points)) for name, points in parts.items()]
        yield charts.areas(areas, title="Seconds of each step by part")


def _waste(metrics: Metrics, charts: Charts) -> Iterator[Markup]:
    """Padding and the replicas' imbalance, if any was recorded."""
    lines = []
    for name, colour, label in (
        ("padding", "#cc79a7", "padding, %"),
        ("imbalance", "#e69f00", "busiest replica above the mean, %"),
    ):
        points = [(step, 100 * value) for step, value in metrics.series(name)]
        if any(value for _, value in points):
            lines.append(Line(running_mean(points), colour, label, faint=points))
    if lines:
        yield element("h3", "padding, and work of the busiest replica above the mean, percent")
        yield charts.lines(lines, title="Padding and imbalance by step")


def expert_section(metrics: Metrics, charts: Charts) -> Iterator[Markup]:
    """How evenly tokens are spread over experts.

    Args:
        metrics: The metrics of a run.
        charts: What draws the charts of the page.

    Yields:
        A heading and a chart for each quantity that was recorded; nothing for a decoder without experts.
    """
    if balance := metrics.series("balance_loss"):
        yield element("h3", "loss that balances experts, before its weight")
        line = Line(running_mean(balance), "#d55e00", "balancing loss", faint=balance)
        yield charts.lines([line], title="Balancing loss by step")
    if busiest := [(step, 100 * value) for step, value in metrics.series("busiest_expert")]:
        yield element("h3", "busiest expert of a layer, percent of the layer's tokens")
        line = Line(running_mean(busiest), "#56b4e9", "busiest expert, %", faint=busiest)
        yield charts.lines([line], title="Busiest expert by step")


def _with_share(name: str, parts: dict[str, list[Point]]) -> str:
    total = sum(value for points in parts.values() for _, value in points)
    return f"{name} {sum(value for _, value in parts[name]) / total:.0%}"


def timeline_section(steps: Sequence[RecordedStep]) -> Iterator[Markup]:
    """A drawing and its caption for each recorded step."""
    for step in steps:
        yield element("h3", f"step {step.step}, encoder {step.placement}")
        yield wide_drawing(timeline_drawing(step))
        yield element("p", timeline_caption(step))


def timeline_caption(step: RecordedStep) -> str:
    """The numbers of a recorded step, in words."""
    error = f" Ranks of different machines may be off by {step.clock_error * 1e3:.2f} ms." if step.clock_error else ""
    return (
        f"{step.seconds:.3f} s; in the schedule a rank runs no pass {step.idle:.0%} of the time, on average. Numbers "
        f"are micro-batches; empty is waiting and sending.{error}"
    )


def bars(rows: Sequence[tuple[str, dict[str, float]]]) -> Markup:
    """The seconds of a mean step by part, as one bar per row, all to the same scale.

    Args:
        rows: Label and seconds by part of each bar.

    Returns:
        The drawing.
    """
    width, left, height = 900.0, 190.0, 30.0
    longest = max((sum(seconds.values()) for _, seconds in rows), default=0.0)
    if not longest:
        return element("p", "no values were recorded")
    parts = []
    for number, (label, seconds) in enumerate(rows):
        y, x = 34 + number * (height + 10), left
        parts.append(text(left - 10, y + height / 2 + 4, label, text_anchor="end"))
        for name, value in seconds.items():
            wide = value / longest * (width - left - 70)
            parts.append(
                element("g", element("title", f"{name}: {value:.4g} s"), rect(x, y, wide, height, fill=PARTS[name]))
            )
            x += wide
        parts.append(text(x + 8, y + height / 2 + 4, f"{sum(seconds.values()):.3g} s", text_anchor="start", fill=FAINT))
    x = left
    for name in [name for name in PARTS if any(name in seconds for _, seconds in rows)]:
        parts += [
            rect(x, 6, 11, 11, fill=PARTS[name], rx=2),
            text(x + 15, 15.5, name, size=11, fill=FAINT, text_anchor="start"),
        ]
        x += 26 + 6.2 * len(name)
    return drawing(width, 34 + len(rows) * (height + 10) + 6, "Seconds of a step by part", *parts)
