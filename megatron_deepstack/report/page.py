"""`report RUN`: one HTML page about a run that needs no network and no script.

Everything on it is read from the run folder and the stores it names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import DataError
from megatron_deepstack.report.chart import Line, line_chart, running_mean
from megatron_deepstack.report.frame import document, duration, facts, section, write
from megatron_deepstack.report.health import health_section
from megatron_deepstack.report.pictures import Pictures
from megatron_deepstack.report.records import Answer, Metrics, read_answers, read_metrics
from megatron_deepstack.report.settings import recipe_table
from megatron_deepstack.report.speed import median, speed_section, timeline_section
from megatron_deepstack.report.stages import stage_drawing
from megatron_deepstack.report.svg import PALETTE, Markup, element, joined
from megatron_deepstack.report.timeline import read_timelines

REPORT = "report.html"
_MOST_SHOWN = 12
"""Answers shown with their pictures, of the right ones and of the wrong ones each."""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page to `output`, or into the run folder. Raises DataError if `run` is no run folder."""
    require_run(run)
    return write(output or run / REPORT, page(run))


def require_run(run: Path) -> None:
    """Raise DataError if `run` is no run folder."""
    if not RunFolder(run).recipe.is_file():
        raise DataError(f"{run}: holds no {RECIPE_FILE}; expected the run_dir of a `train`")


def page(run: Path) -> str:
    """The page's HTML."""
    recipe, metrics, answers = load_recipe(RunFolder(run).recipe), read_metrics(run), read_answers(run)
    timelines = read_timelines(run)
    return document(
        recipe.name,
        element("h1", recipe.name),
        element("p", summary(recipe)),
        facts(list(_facts(recipe, metrics, answers))),
        section("Loss", *_loss(metrics)),
        section("Speed", *speed_section(metrics)),
        *([section("What each rank did when", *timeline_section(timelines))] if timelines else []),
        section("Events", *health_section(metrics)),
        section("Which stack reaches which stage", stage_drawing(recipe)),
        section("Held-out questions", *_answers(answers)),
        section("Recipe", element("p", "As resolved; bold where it differs from the defaults."), recipe_table(recipe)),
    )


def summary(recipe: Recipe) -> str:
    """Model and layout in a line."""
    parallel, model = recipe.parallel, recipe.model
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    return (
        f"{model.variant}, {model.vision.num_layers}-layer ViT at {model.vision.image_size} pixels, "
        f"{model.language.num_layers}-layer decoder {model.language.hidden_size} wide; one replica on {layout} ranks"
    )


def _facts(recipe: Recipe, metrics: Metrics, answers: Sequence[Answer]) -> Iterator[tuple[str, str]]:
    if metrics.records:
        yield f"{metrics.records[-1]['step']} / {recipe.train.steps}", "steps"
    if losses := metrics.series("loss"):
        yield f"{losses[-1][1]:.4g}", "last loss"
    if validation := metrics.series("validation_loss"):
        yield f"{min(value for _, value in validation):.4g}", "best validation loss"
    if (speed := median(metrics, "tokens_per_second")) is not None:
        yield f"{speed:,.0f}", "tokens per second, median"
    if (share := median(metrics, "mfu")) is not None:
        yield f"{share:.1%}", "MFU, median"
    if seconds := sum(value for _, value in metrics.series("step_seconds")):
        yield duration(seconds), "in training steps"
    if answers:
        right = sum(answer.correct for answer in answers)
        commonest = Counter(answer.expected for answer in answers).most_common(1)[0][1]
        chance = f"the commonest answer every time: {commonest / len(answers):.1%}"
        yield f"{right} / {len(answers)}", f"answers exactly right ({right / len(answers):.1%}; {chance})"


def _loss(metrics: Metrics) -> Iterator[Markup]:
    marks = [(step, "resumed") for step in metrics.resumed_at]
    losses = metrics.series("loss")
    yield line_chart([Line(running_mean(losses), PALETTE[0], faint=losses)], title="Training loss by step", marks=marks)
    if broken := metrics.num_not_finite("loss"):
        yield element("p", f"{broken} steps had a loss that is not a number and are not drawn.")
    if validation := metrics.series("validation_loss"):
        yield element("h3", "validation loss")
        yield line_chart([Line(validation, PALETTE[2])], title="Validation loss by step")
    if norms := metrics.series("gradient_norm"):
        yield element("h3", "gradient norm")
        yield line_chart([Line(running_mean(norms), PALETTE[6], faint=norms)], title="Gradient norm by step")
    if rates := list(_rates(metrics)):
        yield element("h3", "learning rate")
        yield line_chart(rates, title="Learning rate by step")


def _rates(metrics: Metrics) -> Iterator[Line]:
    """One line a part where parts are recorded, else the one rate there is."""
    parts = sorted({part for record in metrics.records for part in record.get("lr_by_part") or ()})
    for number, part in enumerate(parts):
        points = [(r["step"], r["lr_by_part"][part]) for r in metrics.records if part in (r.get("lr_by_part") or ())]
        yield Line(points, PALETTE[(5, 0, 2)[number % 3]], label=part)
    if not parts and (rates := metrics.series("lr")):
        yield Line(rates, PALETTE[5])


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
