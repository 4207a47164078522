"""`report RUN RUN...`: several runs on one page, with losses, speed, scores, and where recipes differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DataError
from megatron_deepstack.platform.quantity import duration, flop_rate
from megatron_deepstack.report.drawing.chart import Charts, Line, running_mean
from megatron_deepstack.report.drawing.frame import document, section, table, wide_drawing, write
from megatron_deepstack.report.drawing.svg import Markup, element, joined, stack_colour
from megatron_deepstack.report.drawing.timeline import RecordedStep, read_timelines, timeline_drawing
from megatron_deepstack.report.evaluations import asked_differently, evaluation_sections
from megatron_deepstack.report.health import events
from megatron_deepstack.report.page import summary
from megatron_deepstack.report.records import Metrics, read_metrics
from megatron_deepstack.report.settings import differences
from megatron_deepstack.report.speed import bars, median, seconds_by_part, timeline_caption
from megatron_deepstack.run_folder.answers import Answer, Score, read_answers
from megatron_deepstack.run_folder.recipe import require_run
from megatron_deepstack.scores.evaluation import read_evaluations
from megatron_deepstack.scores.metrics import METRICS

COMPARISON = "comparison.html"
_EVERY_STEP = ("loss", "tokens_per_second")
"""Quantities that are recorded after every step, and drawn with their running mean."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """What is read from one run."""

    label: str
    """The run's name; with the folder's name added if several runs have the same name."""
    colour: str
    recipe: Recipe
    metrics: Metrics
    answers: tuple[Answer, ...]
    timelines: Sequence[RecordedStep]


def write_comparison(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page that compares several runs.

    Args:
        runs: Folders of runs.
        output: File to write; None writes into the first run's folder.

    Returns:
        The file.

    Raises:
        ConfigError: A folder is not the folder of a run.
        DataError: A run is named twice, or the file cannot be written.
    """
    for run in runs:
        require_run(run)
    if len({run.resolve() for run in runs}) < len(runs):
        raise DataError(f"report: the same run is named twice among {', '.join(map(str, runs))}")
    return write(output or runs[0] / COMPARISON, comparison(runs))


def comparison(folders: Sequence[Path]) -> str:
    """The page's HTML."""
    runs, charts = _read(folders), Charts()
    title = " and ".join(run.label for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    return document(
        title,
        charts,
        element("h1", title),
        *(element("p", _dot(run), f"{run.label}: {summary(run.recipe)}") for run in runs),
        section("Results", _results(runs), *(element("p", element("strong", line)) for line in _different(runs))),
        *evaluation_sections([(run.label, folder) for run, folder in zip(runs, folders, strict=True)]),
        section("Loss", *_losses(runs, charts)),
        section("Speed", *_speeds(runs, charts)),
        *_timelines(runs),
        section("Where the recipes differ", _differences(runs)),
    )


def warnings(folders: Sequence[Path]) -> list[str]:
    """Where scores of several runs must not be compared, since they were not asked the same.

    Args:
        folders: Folders of runs.

    Returns:
        A line for each warning.

    Raises:
        DataError: Answers or an evaluation are damaged.
    """
    evaluations = [{one.name: one for one in read_evaluations(folder)} for folder in folders]
    found = [
        asked_differently(evaluations[0][name], one)
        for others in evaluations[1:]
        for name, one in others.items()
        if name in evaluations[0]
    ]
    return [*_different(_read(folders)), *filter(None, found)]


def _different(runs: Sequence[Run]) -> list[str]:
    """A line if runs were asked held-out questions of different stores."""
    asked = {run.label: run.answers[0].fingerprint for run in runs if run.answers}
    known = {label: fingerprint for label, fingerprint in asked.items() if fingerprint is not None}
    if len(set(known.values())) < 2:
        return []
    listed = ", ".join(f"{label}: {fingerprint[:12]}" for label, fingerprint in known.items())
    return [f"Exact matches are of different stores and must not be compared. Their fingerprints: {listed}."]


def _read(folders: Sequence[Path]) -> list[Run]:
    recipes = [load_recipe(RunFolder(folder).recipe) for folder in folders]
    names = [recipe.name for recipe in recipes]
    return [
        Run(
            label=recipe.name if names.count(recipe.name) == 1 else f"{recipe.name} ({folder})",
            colour=stack_colour(number),
            recipe=recipe,
            metrics=read_metrics(folder),
            answers=read_answers(folder),
            timelines=read_timelines(folder),
        )
        for number, (folder, recipe) in enumerate(zip(folders, recipes, strict=True))
    ]


def _dot(run: Run) -> Markup:
    return element("span", "\N{BLACK CIRCLE} ", style=f"color: {run.colour}")


def _results(runs: Sequence[Run]) -> Markup:
    """A table with one row for each run."""
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("steps", lambda run: f"{run.metrics.records[-1]['step'] if run.metrics.records else 0}"),
        ("last mean loss", lambda run: _number(_last(running_mean(run.metrics.series("loss"))))),
        ("best validation", lambda run: _number(_lowest(run.metrics.series("validation_loss")))),
        ("exact match", lambda run: _score(run.answers)),
        ("tokens/s", lambda run: _number(median(run.metrics, "tokens_per_second"), ",.0f")),
        ("FLOP/s a rank", lambda run: _flops(median(run.metrics, "tflops_per_second_per_rank"))),
        ("MFU", lambda run: _number(median(run.metrics, "mfu"), ".1%")),
        ("memory", lambda run: _memory(run.metrics)),
        ("in steps", lambda run: duration(sum(value for _, value in run.metrics.series("step_seconds")))),
        ("events", lambda run: f"{len(events(run.metrics))}"),
    ]
    rows = [[joined(_dot(run), run.label), *(value(run) for _, value in columns)] for run in runs]
    return table(["run", *(name for name, _ in columns)], rows)


def _last(points: Sequence[tuple[float, float]]) -> float | None:
    return points[-1][1] if points else None


def _lowest(points: Sequence[tuple[float, float]]) -> float | None:
    return min((value for _, value in points), default=None)


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _flops(tflops: float | None) -> str:
    return "-" if tflops is None else " ".join(flop_rate(tflops))


def _score(answers: Sequence[Answer]) -> str:
    score = Score.of(answers)
    return f"{score.correct / score.total:.1%}" if score.total else "-"


def _memory(metrics: Metrics) -> str:
    most = max((value for _, value in metrics.series("memory_bytes")), default=0.0)
    return f"{most / _GIB:.1f} GiB" if most else "-"


def _losses(runs: Sequence[Run], charts: Charts) -> list[Markup]:
    drawn = [_overlaid(charts, runs, "loss", "Training loss by step")]
    if any(run.metrics.series("validation_loss") for run in runs):
        drawn += [
            element("h3", "validation loss"),
            _overlaid(charts, runs, "validation_loss", "Validation loss by step"),
        ]
    for metric in METRICS:
        if any(run.metrics.series(f"evaluation/{metric}") for run in runs):
            named = metric.replace("_", " ")
            drawn += [
                element("h3", f"{named} of questions asked during training"),
                _overlaid(charts, runs, f"evaluation/{metric}", f"{named.capitalize()} by step"),
            ]
    return drawn


def _overlaid(charts: Charts, runs: Sequence[Run], name: str, title: str) -> Markup:
    lines = []
    for run in runs:
        points = run.metrics.series(name)
        mean = running_mean(points) if name in _EVERY_STEP else points
        lines.append(Line(mean, run.colour, label=run.label, faint=points if len(runs) < 4 else ()))
    return charts.lines(lines, title=title, log="loss" in name)


def _speeds(runs: Sequence[Run], charts: Charts) -> list[Markup]:
    means = [(run.label, _mean_seconds(run.metrics)) for run in runs]
    return [
        element("h3", "tokens per second"),
        _overlaid(charts, runs, "tokens_per_second", "Tokens per second by step"),
        element("h3", "seconds of a mean step, by part, on rank 0"),
        wide_drawing(bars(means)),
    ]


def _mean_seconds(metrics: Metrics) -> dict[str, float]:
    parts = seconds_by_part(metrics)
    return {name: statistics.fmean(value for _, value in points) for name, points in parts.items()}


def _timelines(runs: Sequence[Run]) -> list[Markup]:
    """The first recorded step of each run that has any, all to the same scale."""
    chosen = [(run, run.timelines[0]) for run in runs if run.timelines]
    if not chosen:
        return []
    longest = max(step.seconds for _, step in chosen)
    parts: list[Markup] = []
    for run, step in chosen:
        parts.append(element("h3", f"{run.label}: step {step.step}, encoder {step.placement}"))
        parts.append(wide_drawing(timeline_drawing(step, seconds=longest)))
        parts.append(element("p", timeline_caption(step)))
    return [section("What each rank did when", *parts)]


def _differences(runs: Sequence[Run]) -> Markup:
    found = differences([run.recipe for run in runs])
    if not found:
        return element("p", "Nowhere, but for names and folders.")
    return table(["field", *(run.label for run in runs)], [[path, *values] for path, values in found])
