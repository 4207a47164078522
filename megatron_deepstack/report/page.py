"""`report RUN`: one HTML page about a run that needs no network.

Everything on it is read from the run folder and from the stores that its answers name. The page's script draws the
charts, sorts and filters; without it, everything else is still there. If a store is missing, only the pictures are
missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.platform.quantity import duration
from megatron_deepstack.report.drawing.chart import Charts, Line, running_mean
from megatron_deepstack.report.drawing.frame import document, facts, section, table, wide_drawing, write
from megatron_deepstack.report.drawing.stages import stage_drawing
from megatron_deepstack.report.drawing.svg import PALETTE, Markup, element, joined
from megatron_deepstack.report.drawing.timeline import read_timelines
from megatron_deepstack.report.health import health_section
from megatron_deepstack.report.pictures import Pictures
from megatron_deepstack.report.records import Metrics, read_metrics
from megatron_deepstack.report.settings import recipe_table
from megatron_deepstack.report.speed import expert_section, median, speed_section, timeline_section
from megatron_deepstack.run_folder.answers import Answer, AnswerSet, Score, read_answer_sets
from megatron_deepstack.run_folder.recipe import require_run
from megatron_deepstack.run_folder.starting_weights import HEAD, read_starting_weights
from megatron_deepstack.scores.evaluation import PAGE, Evaluation, folder_of, read_evaluations
from megatron_deepstack.scores.metrics import METRICS

REPORT = "report.html"
_MOST_LISTED = 2000
"""Answers in the table."""
_MOST_SHOWN = 12
"""Largest number of right answers shown with their pictures, and of wrong ones."""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page about a run.

    Args:
        run: Folder of the run.
        output: File to write; None writes RUN/report.html.

    Returns:
        The file.

    Raises:
        ConfigError: `run` is not the folder of a run.
        DataError: The file cannot be written.
    """
    require_run(run)
    return write(output or run / REPORT, page(run))


def page(run: Path) -> str:
    """The page's HTML."""
    recipe, metrics, sets = load_recipe(RunFolder(run).recipe), read_metrics(run), read_answer_sets(run)
    answers = next((one.answers for one in sets if one.held_out), ())
    timelines, charts = read_timelines(run), Charts()
    return document(
        recipe.name,
        charts,
        element("h1", recipe.name),
        element("p", summary(recipe)),
        facts(list(_facts(recipe, metrics, answers))),
        section("Loss", *_loss(metrics, charts)),
        section("Speed", *speed_section(metrics, charts)),
        *([section("What each rank did when", *timeline_section(timelines))] if timelines else []),
        *_experts(recipe, metrics, charts),
        section("Events", *health_section(metrics)),
        section("Which stack reaches which stage", wide_drawing(stage_drawing(recipe))),
        *_evaluations(run),
        *_answer_sections(sets),
        *_starting_weights(run),
        section("Recipe", element("p", "As resolved; bold where it differs from the defaults."), recipe_table(recipe)),
    )


def summary(recipe: Recipe) -> str:
    """Model and layout in one line."""
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
    metric = recipe.evaluation.metric
    if scores := metrics.series(f"evaluation/{metric}"):
        step, best = max(scores, key=lambda pair: (pair[1], pair[0]))
        yield f"{best:.1%}", f"best {metric.replace('_', ' ')} of questions during training, after step {step}"
    if (speed := median(metrics, "tokens_per_second")) is not None:
        yield f"{speed:,.0f}", "tokens per second, median"
    if (share := median(metrics, "mfu")) is not None:
        yield f"{share:.1%}", "MFU, median"
    if seconds := sum(value for _, value in metrics.series("step_seconds")):
        yield duration(seconds), "in training steps"
    if answers:
        score = Score.of(answers)
        chance = f"the commonest answer every time: {score.chance:.1%}"
        if score.total:
            share = score.correct / score.total
            yield f"{score.correct} / {score.total}", f"answers exactly right ({share:.1%}; {chance})"


def _experts(recipe: Recipe, metrics: Metrics, charts: Charts) -> Iterator[Markup]:
    """How evenly tokens are spread, if the decoder has experts and something was recorded."""
    drawn = tuple(expert_section(metrics, charts))
    if drawn:
        language = recipe.model.language
        active, number = language.num_active_experts, language.num_experts
        even = f"Spread evenly, each expert sees {active / number:.1%} of the tokens; the balancing loss is {active}."
        yield section("Experts", element("p", even), *drawn)


def _starting_weights(run: Path) -> Iterator[Markup]:
    """Where the weights of the first step came from, if the run has the list."""
    found = read_starting_weights(run)
    if found is None:
        return
    rows = [origin.cells for origin in found.origins(by_file=True)]
    left = [element("p", f"Not used by the model: {name}") for name in found.left_over]
    yield section("Where the weights came from", table(HEAD, rows), *left)


def _loss(metrics: Metrics, charts: Charts) -> Iterator[Markup]:
    marks = [(step, "resumed") for step in metrics.resumed_at]
    losses = metrics.series("loss")
    line = Line(running_mean(losses), PALETTE[0], "loss", faint=losses)
    yield charts.lines([line], title="Training loss by step", marks=marks, log=True)
    if broken := metrics.num_not_finite("loss"):
        yield element("p", f"{broken} steps had a loss that is not a number and are not drawn.")
    if validation := metrics.series("validation_loss"):
        yield element("h3", "validation loss")
        yield charts.lines([Line(validation, PALETTE[2], "validation loss")], title="Validation loss by step", log=True)
    if scores := _scores(metrics):
        yield element("h3", "scores of questions asked during training")
        yield charts.lines(scores, title="Scores by step")
    if norms := metrics.series("gradient_norm"):
        yield element("h3", "gradient norm")
        line = Line(running_mean(norms), PALETTE[6], "gradient norm", faint=norms)
        yield charts.lines([line], title="Gradient norm by step", log=True)
    if rates := list(_rates(metrics)):
        yield element("h3", "learning rate")
        yield charts.lines(rates, title="Learning rate by step")


def _scores(metrics: Metrics) -> list[Line]:
    """One line for each score of the questions that were asked during training; none if there were none."""
    series = {metric: metrics.series(f"evaluation/{metric}") for metric in METRICS}
    return [
        Line(points, PALETTE[number % len(PALETTE)], label=metric.replace("_", " "))
        for number, (metric, points) in enumerate(series.items())
        if points
    ]


def _rates(metrics: Metrics) -> Iterator[Line]:
    """One line for each part of the model if parts were recorded, otherwise one line."""
    parts = sorted({part for record in metrics.records for part in record.get("lr_by_part") or ()})
    for number, part in enumerate(parts):
        points = [(r["step"], r["lr_by_part"][part]) for r in metrics.records if part in (r.get("lr_by_part") or ())]
        yield Line(points, PALETTE[(5, 0, 2)[number % 3]], label=part)
    if not parts and (rates := metrics.series("lr")):
        yield Line(rates, PALETTE[5], "learning rate")


def _answer_sections(sets: Sequence[AnswerSet]) -> Iterator[Markup]:
    """One section for each store whose questions were answered; the held-out questions come first."""
    if not any(one.held_out for one in sets):
        said = "None yet: run `megatron-deepstack generate` on this run, then the report again."
        yield section("Held-out questions", element("p", said))
    pictures = Pictures()
    for one in sets:
        origin = [element("p", f"Asked of the {one.origin}.")] if one.origin else []
        yield section(one.title, *origin, *_answers(one.answers, pictures))


def _evaluations(run: Path) -> Iterator[Markup]:
    """A table of the run's evaluations, those during training by step; nothing if there are none."""
    found = read_evaluations(run)
    rows = [
        (
            _name(run, one),
            "" if one.step is None else str(one.step),
            str(len(one.answers)),
            *(f"{means[metric]:.1%}" if metric in (means := one.means()) else "" for metric in METRICS),
            (one.fingerprint or "")[:12],
        )
        for one in found
    ]
    if rows:
        head = ("evaluation", "step", "questions", *(metric.replace("_", " ") for metric in METRICS), "fingerprint")
        yield section("Evaluations", table(head, rows, sortable=True))


def _name(run: Path, evaluation: Evaluation) -> Markup | str:
    """An evaluation's name, with a link to its page if it has one."""
    page_file = folder_of(run, evaluation.name) / PAGE
    if not page_file.is_file():
        return evaluation.name
    return element("a", evaluation.name, href=page_file.relative_to(run).as_posix())


def _answers(answers: Sequence[Answer], pictures: Pictures) -> Iterator[Markup]:
    """Cards of wrong answers first, since readers look for those; then a table of all answers."""
    yield element("p", Score.of(answers).words)
    yield filter_box(("wrong", "right"))
    for title, correct in (("wrong", False), ("right", True)):
        chosen = [answer for answer in answers if answer.correct is correct]
        if not chosen:
            continue
        shown = chosen[:_MOST_SHOWN]
        count = f"{len(chosen)}" if len(shown) == len(chosen) else f"{len(chosen)}, the first {len(shown)} of them"
        yield element("h3", f"{title}: {count}", style="margin-top: 14px")
        yield element("div", *(_answer(answer, pictures) for answer in shown), class_="answers")
    for line in pictures.told():
        yield element("p", line)
    listed = answers[:_MOST_LISTED]
    more = f"the first {len(listed)} of {len(answers)}" if len(listed) < len(answers) else f"all {len(answers)}"
    ordered = sorted(enumerate(listed), key=lambda pair: (pair[1].correct, pair[0]))
    rows = [(f"{number}", _kind(answer), answer.question, answer.answer, answer.expected) for number, answer in ordered]
    yield element("h3", more, style="margin-top: 18px")
    head = ("number", "result", "question", "answer", "expected")
    yield table(head, rows, sortable=True, kinds=[_kind(answer) for _, answer in ordered])


def _kind(answer: Answer) -> str:
    return "right" if answer.correct else "wrong"


def filter_box(kinds: Sequence[str]) -> Markup:
    """Chooses cards and rows of its section by words and kind; it is hidden if scripts do not run.

    Args:
        kinds: The words of which each card or row carries one.

    Returns:
        The element.
    """
    options = [element("option", name or "all", value=name) for name in ("", *kinds)]
    words = element("label", "words ", Markup('<input type="search">'))
    return element(
        "p",
        words,
        element("label", "show ", element("select", *options)),
        element("output"),
        class_="filter",
        hidden="",
    )


def _answer(answer: Answer, pictures: Pictures) -> Markup:
    views = Markup()
    if answer.store is not None and answer.image is not None:
        views = pictures.views(answer.store, answer.image)
    rows = (("question", answer.question, ""), ("answer", answer.answer, "said"), ("expected", answer.expected, ""))
    listed = [joined(element("dt", name), element("dd", value, class_=kind or None)) for name, value, kind in rows]
    kind = "answer" if answer.correct else "answer wrong"
    return element("article", views, element("dl", *listed), class_=kind, title=answer.id, data_kind=_kind(answer))
