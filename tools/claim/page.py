"""The result as a page in Markdown, a picture of accuracy against operations, and JSON."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_deepstack.report.drawing.svg import Markup, drawing, element
from tools.claim.experiment import Experiment
from tools.claim.findings import FINDINGS, MARGIN, judge
from tools.claim.pages import FINE_KINDS, KINDS
from tools.claim.scores import Estimate, characters, estimate, exact, scores

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each arm: its results at the chosen rate, a result for each seed."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 420, 60, 370, 20, 620


def write_pages(folder: Path, experiment: Experiment, chosen: Results, sweep: Results, command: str) -> None:
    """Write claim.md, claim.svg and claim.json.

    Args:
        folder: Where they are written.
        experiment: What was compared.
        chosen: Results at the chosen rates.
        sweep: Results of the first seed at each rate.
        command: The command that makes them, for the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(name, results) for name, results in chosen.items()]
    document = {"arms": rows, "sweep": _sweep(sweep), "findings": _findings(chosen)}
    (folder / "claim.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "claim.svg").write_text(_picture(rows) + "\n", encoding="utf-8")
    (folder / "claim.md").write_text(_page(experiment, document, command), encoding="utf-8")


def _row(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = results[0]
    return {
        "arm": name,
        "learning_rate": first["learning_rate"],
        "exact": _plain(estimate(scores(results, exact, *FINE_KINDS))),
        "characters": _plain(estimate(scores(results, characters, *FINE_KINDS))),
        "kinds": {kind: _plain(estimate(scores(results, exact, kind))) for kind in KINDS},
        "context_length": first["context_length"],
        "training_flops_per_sample": first["training_flops_per_sample"],
        "step_seconds": min(result["step_seconds"] for result in results),
        "cache_bytes_per_sample": first["cache_bytes_per_sample"],
    }


def _plain(value: Estimate) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high}


def _sweep(sweep: Results) -> list[dict[str, Any]]:
    return [
        {
            "arm": name,
            "learning_rate": result["learning_rate"],
            "exact_on_tune": statistics.fmean(exact(one) for one in result["tune"] if one["kind"] in FINE_KINDS),
        }
        for name, results in sweep.items()
        for result in results
    ]


def _findings(chosen: Results) -> list[dict[str, Any]]:
    measured = {name: scores(results, exact, *FINE_KINDS) for name, results in chosen.items()}
    found = []
    for finding in FINDINGS:
        judged = judge(finding, measured)
        if judged is not None:
            found.append({"statement": finding.statement, "difference": _plain(judged[0]), "verdict": judged[1]})
    return found


def _page(experiment: Experiment, document: Mapping[str, Any], command: str) -> str:
    arms, kinds = document["arms"], list(KINDS)
    num_test = experiment.pages["test"]
    lines = [
        "# The claim, shown",
        "",
        f"Written by `{command}`. {len(arms)} models of under a million parameters, trained from scratch on drawn "
        f"documents for {experiment.base['train.steps']} steps of {experiment.base['train.global_batch_size']} pages, "
        f"each with {len(experiment.seeds)} seeds, on the same pages in the same order. A number in a table, a word in "
        "a form and a label in a chart's legend can only be read in the high-resolution crops; the colour of a large "
        "shape, the control, is as plain in the global view. The learning rate of each arm is the best of "
        f"{len(experiment.learning_rates)} on pages kept for that; the scores are of {num_test} other pages of each "
        "kind. Intervals are of 95 %, over seeds and pages.",
        "",
        "![Exact match against operations of training](claim.svg)",
        "",
        "## What each arm reads",
        "",
        "Exact match in percent. `fine` is the mean of the three kinds that need the crops. The context is the number "
        "of visual tokens in the sequence; the step is the median one of the arm's quietest run, in one thread beside "
        "another run; the key/value cache is of one sample in bfloat16.",
        "",
        f"| arm | fine | characters | {' | '.join(kinds)} | context | MFLOP a sample, trained | step, s | cache, KiB |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|---|---|",
    ]
    for arm in arms:
        per_kind = " | ".join(f"{100 * arm['kinds'][kind]['mean']:.0f}" for kind in kinds)
        lines.append(
            f"| {arm['arm']} | {_text(arm['exact'])} | {_text(arm['characters'])} | {per_kind} | "
            f"{arm['context_length']} | {arm['training_flops_per_sample'] / 1e6:.0f} | {arm['step_seconds']:.2f} | "
            f"{arm['cache_bytes_per_sample'] / 1024:.0f} |"
        )
    lines += [
        "",
        "## Which findings of the paper appear at this size",
        "",
        f"Differences of `fine` in points, paired by page and seed. Arms within {100 * MARGIN:.0f} points are close.",
        "",
        "| finding | difference | at this size it |",
        "|---|---|---|",
        *(f"| {one['statement']} | {_text(one['difference'])} | {one['verdict']} |" for one in document["findings"]),
        "",
        "## The sweep of learning rates",
        "",
        f"Exact match of the fine kinds on the pages for tuning, first seed.{_at_an_end(document['sweep'])}",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in experiment.learning_rates)} |",
        f"|---|{'---|' * len(experiment.learning_rates)}",
    ]
    for arm in arms:
        here = {one["learning_rate"]: one["exact_on_tune"] for one in document["sweep"] if one["arm"] == arm["arm"]}
        cells = " | ".join(f"{100 * here[rate]:.0f}" if rate in here else "" for rate in experiment.learning_rates)
        lines.append(f"| {arm['arm']} | {cells} |")
    lines += [
        "",
        "An arm is one line of `tools/claim/claim.yaml`: add one and run the command again; runs that are there are "
        "not repeated.",
    ]
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in lines) + "\n"


def _at_an_end(sweep: Sequence[Mapping[str, Any]]) -> str:
    """Say so if every arm is best at the smallest or at the largest rate, since better ones may lie beyond it."""
    best: dict[str, Mapping[str, Any]] = {}
    for one in sweep:
        if one["arm"] not in best or one["exact_on_tune"] > best[one["arm"]]["exact_on_tune"]:
            best[one["arm"]] = one
    rates, chosen = {one["learning_rate"] for one in sweep}, {one["learning_rate"] for one in best.values()}
    for word, end in (("smallest", min(rates)), ("largest", max(rates))):
        if len(rates) > 1 and chosen == {end}:
            return f" Every arm is best at the {word} rate, so better ones may lie beyond it."
    return ""


def _wrapped(line: str) -> str:
    """Return prose in lines of at most 120 characters."""
    return textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)


def _text(value: Mapping[str, float]) -> str:
    return str(Estimate(**value))


def _picture(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy against operations of training per sample, with intervals."""
    most = 1.15 * max(row["training_flops_per_sample"] for row in rows)

    def at(flops: float, accuracy: float) -> tuple[float, float]:
        return _LEFT + (_RIGHT - _LEFT) * flops / most, _BOTTOM - (_BOTTOM - _TOP) * accuracy

    parts = [element("style", _STYLE)]
    for tenth in range(0, 11, 2):
        y = at(0, tenth / 10)[1]
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{10 * tenth} %", x=_LEFT - 8, y=y + 4, text_anchor="end"))
    for quarter in range(5):
        x = _LEFT + (_RIGHT - _LEFT) * quarter / 4
        parts.append(element("text", f"{most * quarter / 4e6:.0f}", x=x, y=_BOTTOM + 20, text_anchor="middle"))
    middle = (_LEFT + _RIGHT) / 2
    parts.append(
        element("text", "MFLOP a sample, forward and backward", x=middle, y=_BOTTOM + 42, text_anchor="middle")
    )
    taken: list[tuple[float, float, bool]] = []
    columns = {at(row["training_flops_per_sample"], 0)[0] for row in rows}
    for row in sorted(rows, key=lambda one: -one["exact"]["mean"]):
        flops, value = row["training_flops_per_sample"], row["exact"]
        (x, y), (_, low), (_, high) = (at(flops, value[key]) for key in ("mean", "low", "high"))
        parts.append(element("line", x1=x, x2=x, y1=low, y2=high, class_="bar"))
        parts.append(element("circle", cx=x, cy=y, r=4))
        label = y + 4
        on_left = x > middle + 60 or any(20 < column - x < 150 for column in columns)
        while any(abs(label - other) < 13 and abs(x - at_x) < 60 and side == on_left for at_x, other, side in taken):
            label += 13
        taken.append((x, label, on_left))
        shift = -12 if on_left else 12
        parts.append(element("line", x1=x, x2=x + shift - shift / 6, y1=y, y2=label - 4, class_="grid"))
        parts.append(element("text", row["arm"], x=x + shift, y=label, text_anchor="end" if on_left else "start"))
    return drawing(_WIDTH, _HEIGHT, "Exact match of the fine kinds against operations of training", *parts)


_STYLE = (
    "text{font-size:12px;fill:#333}.grid{stroke:#ddd}.bar{stroke:#36c;stroke-width:1.5}circle{fill:#36c}"
    "@media (prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}.bar{stroke:#8af}circle{fill:#8af}}"
)
