"""`report RUN`: one HTML page about a run that needs no network and no script.

Everything on it is read from the run folder and the stores it names; text from data and models is escaped, and the
page's own security policy forbids it to load anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_deepstack import __version__
from megatron_deepstack.config.build import plain
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DataError
from megatron_deepstack.report.chart import line_chart, running_mean
from megatron_deepstack.report.pictures import Pictures
from megatron_deepstack.report.records import RECIPE, Answer, Metrics, read_answers, read_metrics
from megatron_deepstack.report.stages import stage_drawing
from megatron_deepstack.report.svg import Markup, element, joined

REPORT = "report.html"
_MOST_SHOWN = 12
"""Answers shown with their pictures, of the right ones and of the wrong ones each."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: Path) -> Path:
    """Write the page into the run folder and return its path. Raises DataError if `run` is no run folder."""
    if not (run / RECIPE).is_file():
        raise DataError(f"{run}: holds no {RECIPE}; expected the run_dir of a `train`")
    file = run / REPORT
    try:
        file.write_text(page(run), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error}") from error
    return file


def page(run: Path) -> str:
    """The page's HTML."""
    recipe, metrics, answers = load_recipe(run / RECIPE), read_metrics(run), read_answers(run)
    body = element(
        "main",
        element("h1", recipe.name),
        element("p", _summary(recipe)),
        _facts(recipe, metrics, answers),
        _section("Loss", *_loss(metrics)),
        _section("Which stack reaches which stage", stage_drawing(recipe)),
        _section("Held-out questions", *_answers(answers)),
        _section("Recipe", element("p", "As resolved; bold where it differs from the defaults."), _recipe(recipe)),
        element("footer", _versions()),
    )
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{recipe.name} - report"),
        element("style", style),
    )
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en") + "\n"


def _section(title: str, *children: str | Markup) -> Markup:
    return element("section", element("h2", title), *children)


def _summary(recipe: Recipe) -> str:
    parallel, model = recipe.parallel, recipe.model
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    return (
        f"{model.variant}, {model.vision.num_layers}-layer ViT at {model.vision.image_size} pixels, "
        f"{model.language.num_layers}-layer decoder {model.language.hidden_size} wide; one replica on {layout} ranks"
    )


def _facts(recipe: Recipe, metrics: Metrics, answers: Sequence[Answer]) -> Markup:
    facts = []
    if metrics.records:
        facts.append((f"{metrics.records[-1]['step']} / {recipe.train.steps}", "steps"))
    losses = metrics.series("loss")
    if losses:
        facts.append((f"{losses[-1][1]:.4g}", "last loss"))
    speeds = sorted(value for _, value in metrics.series("tokens_per_second"))
    if speeds:
        facts.append((f"{speeds[len(speeds) // 2]:,.0f}", "tokens per second, median"))
    seconds = sum(value for _, value in metrics.series("step_seconds"))
    if seconds:
        facts.append((_duration(seconds), "in training steps"))
    if answers:
        right = sum(answer.correct for answer in answers)
        commonest = Counter(answer.expected for answer in answers).most_common(1)[0][1]
        chance = f"the commonest answer every time: {commonest / len(answers):.1%}"
        facts.append((f"{right} / {len(answers)}", f"answers exactly right ({right / len(answers):.1%}; {chance})"))
    return element(
        "div",
        *(element("div", element("b", value), element("span", name), class_="fact") for value, name in facts),
        class_="facts",
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _loss(metrics: Metrics) -> Iterator[Markup]:
    marks = [(step, "resumed") for step in metrics.resumed_at]
    losses = metrics.series("loss")
    yield line_chart(running_mean(losses), title="Training loss by step", colour="#0072b2", faint=losses, marks=marks)
    if broken := metrics.num_not_finite("loss"):
        yield element("p", f"{broken} steps had a loss that is not a number and are not drawn.")
    if validation := metrics.series("validation_loss"):
        yield element("h3", "validation loss")
        yield line_chart(validation, title="Validation loss by step", colour="#009e73")
    if rates := metrics.series("lr"):
        yield element("h3", "learning rate")
        yield line_chart(rates, title="Learning rate by step", colour="#d55e00")


def _answers(answers: Sequence[Answer]) -> Iterator[Markup]:
    if not answers:
        yield element("p", "None yet: run `megatron-deepstack generate` on this run, then the report again.")
        return
    pictures = Pictures()
    for title, correct in (("right", True), ("wrong", False)):
        chosen = [answer for answer in answers if answer.correct is correct]
        if not chosen:
            continue
        shown = chosen[:_MOST_SHOWN]
        count = f"{len(chosen)}" if len(shown) == len(chosen) else f"{len(chosen)}, the first {len(shown)} of them"
        yield element("h3", f"{title}: {count}", style="margin-top: 14px")
        yield element("div", *(_answer(answer, pictures) for answer in shown), class_="answers")


def _answer(answer: Answer, pictures: Pictures) -> Markup:
    views = Markup()
    if answer.store is not None and answer.image is not None:
        views = pictures.views(answer.store, answer.image)
    rows = (("question", answer.question, ""), ("answer", answer.answer, "said"), ("expected", answer.expected, ""))
    listed = [joined(element("dt", name), element("dd", value, class_=kind or None)) for name, value, kind in rows]
    kind = "answer" if answer.correct else "answer wrong"
    return element("article", views, element("dl", *listed), class_=kind, title=answer.id)


def _recipe(recipe: Recipe) -> Markup:
    return element("div", *_sections(recipe, Recipe(), "run"), class_="recipe")


def _sections(config: Any, default: Any, title: str) -> Iterator[Markup]:
    """A table of a section's own fields, then those of the sections inside it."""
    rows, inner = [], []
    for item in fields(config):
        value, usual = getattr(config, item.name), getattr(default, item.name)
        if is_dataclass(value):
            inner.append((value, usual, item.name if title == "run" else f"{title}.{item.name}"))
        else:
            cells = joined(element("td", item.name), element("td", _shown(value)))
            rows.append(element("tr", cells, class_="set" if value != usual else None))
    if rows:
        yield element("div", element("h3", title), element("table", *rows))
    for value, usual, name in inner:
        yield from _sections(value, usual, name)


def _shown(value: object) -> str:
    """A value as the recipe's YAML would have it."""
    value = plain(value)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)


def _versions() -> str:
    found = [f"megatron-deepstack {__version__}"]
    for name in ("megatron-core", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
