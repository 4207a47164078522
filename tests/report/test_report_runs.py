"""Reports of what the loop records beyond losses: events, time by part, recorded steps, and several runs at once."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report_page import HOSTILE, Tags
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import OptimizerConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.report.compare import write_comparison
from megatron_deepstack.report.drawing.timeline import Bar, RankLine, RecordedStep, read_timelines, timeline_drawing
from megatron_deepstack.report.health import events
from megatron_deepstack.report.page import write_report
from megatron_deepstack.report.records import Metrics, read_metrics
from megatron_deepstack.report.settings import differences
from megatron_deepstack.report.speed import bars, seconds_by_part
from megatron_deepstack.run_folder.answers import Answer, write_answers


def record(step: int, **changes: object) -> dict[str, object]:
    return {
        "step": step,
        "loss": 4.0 / step,
        "lr": 1e-3,
        "lr_by_part": {"projector": 2e-3, "language": 1e-3},
        "tokens_per_second": 1e4 + step,
        "tflops_per_second_per_rank": 1.5,
        "step_seconds": 2.0,
        "seconds": {"data": 0.5, "schedule": 1.0},
        "applied": True,
        **changes,
    }


def write_run(folder: Path, recipe: Recipe, records: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def recorded(step: int = 3, placement: str = "spread") -> dict[str, object]:
    """Two ranks, two micro-batches; rank 1 waits for rank 0."""
    first = [
        ["encode", None, 0, 0.0, 0.1],
        ["forward", 0, 0, 0.1, 0.2],
        ["forward", 1, 0, 0.2, 0.3],
        ["backward", 0, 0, 0.4, 0.5],
        ["backward", 1, 0, 0.5, 0.6],
        ["schedule", None, 0, 0.1, 0.6],
    ]
    second = [["forward", 0, 0, 0.2, 0.3], ["backward", 0, 0, 0.3, 0.4], ["schedule", None, 0, 0.1, 0.6]]
    ranks = [
        {"rank": rank, "tp": 0, "cp": 0, "dp": 0, "pp": rank, "intervals": intervals}
        for rank, intervals in enumerate((first, second))
    ]
    return {"step": step, "encoder_placement": placement, "clock_error_seconds": 0.0, "ranks": ranks}


EVENTS = {
    "left out": (
        {"applied": False, "loss": math.nan, "samples": ["a", HOSTILE]},
        "left out",
        "loss not finite; samples a",
    ),
    "gradient": ({"applied": False}, "left out", "gradient not finite"),
    "nothing to learn": (
        {"applied": False, "loss": None, "skipped_because": "no sample could be read"},
        "left out",
        "no sample could be read",
    ),
    "spike": ({"spike": True, "samples": ["b"]}, "spike", "loss 1.333; samples b"),
    "unreadable": ({"unreadable": 2, "unreadable_samples": ["c", "d"]}, "unreadable", "2 samples left out .* c, d"),
    "slow": ({"slow_ranks": [3, 5]}, "slow", "ranks 3, 5"),
    "stall": ({"stall_seconds": 1.5}, "stall", "still for 1.50 s"),
    "resumed": ({"resumed": True}, "resumed", "a checkpoint was read"),
}


@pytest.mark.parametrize(("changes", "kind", "about"), EVENTS.values(), ids=EVENTS)
def test_every_kind_of_event_is_listed(tmp_path: Path, changes: dict[str, object], kind: str, about: str) -> None:
    run = write_run(tmp_path / "run", Recipe(), [record(1), record(2), record(3, **changes), record(4)])
    (event,) = events(read_metrics(run))
    assert (event.step, event.kind) == (3, kind)
    assert re.search(about, event.about)
    texts = Tags(write_report(run).read_text(encoding="utf-8")).texts
    assert kind in texts
    assert event.about in texts


def test_a_quiet_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), [record(1, stall_seconds=0.1), record(2)])
    texts = " | ".join(Tags(write_report(run).read_text(encoding="utf-8")).texts)
    assert "No step was left out" in texts
    assert "0.10 s in all, 2.50%" in texts


def test_many_events_are_cut_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), [record(step, spike=True) for step in range(1, 101)])
    assert "and 40 more" in Tags(write_report(run).read_text(encoding="utf-8")).texts


def test_parts_of_a_step_add_up_to_it() -> None:
    parts = seconds_by_part(Metrics(tuple(record(step) for step in (1, 2)), ()))
    assert parts == {
        "data": [(1, 0.5), (2, 0.5)],
        "schedule": [(1, 1.0), (2, 1.0)],
        "other": [(1, 0.5), (2, 0.5)],
    }
    assert ElementTree.fromstring(bars([("a", {}), ("b", {"data": 1.0})])).tag.endswith("svg")


def test_a_report_draws_recorded_steps_in_order(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), [record(step) for step in (1, 2)])
    for step in (12, 3):
        (run / f"timeline_step_{step}.json").write_text(json.dumps(recorded(step)))
    texts = Tags(write_report(run).read_text(encoding="utf-8")).texts
    assert texts.index("step 3, encoder spread") < texts.index("step 12, encoder spread")
    assert "backward of micro-batch 1: 100.00 ms from 500.00" in texts


def test_idle_is_the_share_of_the_schedule_without_a_pass(tmp_path: Path) -> None:
    (tmp_path / "timeline_step_3.json").write_text(json.dumps(recorded()))
    (step,) = read_timelines(tmp_path)
    assert [line.idle for line in step.lines] == pytest.approx([0.2, 0.6])
    assert step.idle == pytest.approx(0.4)
    assert step.seconds == pytest.approx(0.6)


def test_damaged_timelines_are_named(tmp_path: Path) -> None:
    (tmp_path / "timeline_step_3.json").write_text('{"step": 3}')
    with pytest.raises(DataError, match=r"timeline_step_3\.json: is no recorded step"):
        read_timelines(tmp_path)


def boxes_of(root: ElementTree.Element) -> list[tuple[float, float]]:
    """Left edge and width of each box that has a description."""
    found = []
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        if group.find("{http://www.w3.org/2000/svg}title") is not None:
            rect = group.find("{http://www.w3.org/2000/svg}rect")
            assert rect is not None
            found.append((float(rect.attrib["x"]), float(rect.attrib["width"])))
    return found


def test_boxes_lie_where_their_times_are_and_a_common_scale_shrinks_them(tmp_path: Path) -> None:
    (tmp_path / "timeline_step_3.json").write_text(json.dumps(recorded()))
    (step,) = read_timelines(tmp_path)
    own, common = (ElementTree.fromstring(timeline_drawing(step, seconds=s)) for s in (None, 2 * step.seconds))
    assert len(boxes_of(own)) == 5 + 2  # the schedule itself is the row's background
    widths = [width for _, width in boxes_of(own)]
    assert widths == pytest.approx([widths[0]] * 7, abs=0.02)  # each took 0.1 s
    assert [width for _, width in boxes_of(common)] == pytest.approx([width / 2 for width in widths], abs=0.02)
    edges = [x for x, _ in boxes_of(own)[:5]]
    assert edges == pytest.approx([edges[0] + widths[0] * n for n in (0, 1, 2, 4, 5)], abs=0.05)


def test_many_ranks_are_drawn_one_a_stage() -> None:
    box = Bar("forward", 0, 0, 0.0, 1.0)
    lines = tuple(RankLine(rank, f"stage {rank // 16}", rank // 16, (box,), (0.0, 1.0)) for rank in range(64))
    root = ElementTree.fromstring(timeline_drawing(RecordedStep(1, "spread", 0.0, lines)))
    assert len(boxes_of(root)) == 4


def test_runs_beside_each_other(tmp_path: Path) -> None:
    inline = ParallelConfig(encoder_placement=EncoderPlacement.INLINE)
    first = write_run(tmp_path / "a", Recipe(name=HOSTILE), [record(step) for step in (1, 2, 3)])
    second = write_run(
        tmp_path / "b", Recipe(name="other", parallel=inline), [record(1), record(2, validation_loss=1.25)]
    )
    third = write_run(tmp_path / "c", Recipe(name="other"), [])
    for run, placement in ((first, "spread"), (second, "inline")):
        (run / "timeline_step_3.json").write_text(json.dumps(recorded(3, placement)))
    answer = {"id": "a", "question": "?", "answer": "7", "expected": "7", "correct": True}
    (first / "answers.jsonl").write_text(json.dumps(answer) + "\n" + json.dumps({**answer, "correct": False}) + "\n")
    file = write_comparison([first, second, third])
    assert file == first / "comparison.html"
    page = Tags(file.read_text(encoding="utf-8"))
    texts = " | ".join(page.texts)
    for words in ("parallel.encoder_placement", "inline", "1.25", "50.0%", "10,002", f"other ({second})"):
        assert words in texts, words
    assert "optimizer.lr" not in texts
    assert sum(found.get("class") == "chart" for _, found in page.seen) == 3
    assert f"{HOSTILE}: step 3, encoder spread" in page.texts


def test_a_run_is_not_compared_with_itself_or_with_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", Recipe(), [record(1)])
    with pytest.raises(DataError, match="the same run is named twice"):
        write_comparison([run, tmp_path / "." / "a"])
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        write_comparison([run, tmp_path])


def test_only_fields_that_differ_are_listed() -> None:
    one = Recipe(name="a", run_dir="a")
    other = replace(one, name="b", run_dir="b", optimizer=OptimizerConfig(lr=1e-3, vision_lr=1e-4))
    assert differences([one, other]) == [("optimizer.lr", ["2e-05", "0.001"]), ("optimizer.vision_lr", ["-", "0.0001"])]
    assert differences([one, replace(one, name="c")]) == []


def test_the_verb_takes_one_run_or_several(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", Recipe(name="first"), [record(1)])
    second = write_run(tmp_path / "b", Recipe(name="second"), [record(1)])
    assert CliRunner().invoke(app, ["report", str(first)]).exit_code == 0
    assert (first / "report.html").is_file()
    wanted = tmp_path / "both.html"
    assert CliRunner().invoke(app, ["report", str(first), str(second), "--output", str(wanted)]).exit_code == 0
    assert "second" in wanted.read_text(encoding="utf-8")


def test_scores_of_other_stores_are_warned_of(tmp_path: Path) -> None:
    """By the verb, on the page; not where both asked the same store, wherever it lay."""
    recipe = Recipe()
    runs = [write_run(tmp_path / name, replace(recipe, name=name), [record(1)]) for name in ("one", "two")]
    for fingerprints, expected in ((("a" * 64, "b" * 64), True), (("a" * 64, "a" * 64), False)):
        for run, fingerprint in zip(runs, fingerprints, strict=True):
            answer = Answer("0", "q", "yes", "yes", True, f"/{run.name}.zarr", None, 2, fingerprint)
            write_answers(run / "answers.jsonl", [answer])
        result = CliRunner().invoke(app, ["report", *map(str, runs)])
        assert result.exit_code == 0, result.output
        assert ("different stores and must not be compared" in result.stderr) is expected
        assert ("one: aaaaaaaaaaaa, two: bbbbbbbbbbbb" in (runs[0] / "comparison.html").read_text()) is expected
