"""The parts of the claim: pages, arms, dummy stacks, scores, verdicts. The claim itself is measured, not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny_store import write_tiny_store
from tools.claim.experiment import Experiment, read_experiment
from tools.claim.findings import FINDINGS, Finding, judge
from tools.claim.page import write_pages
from tools.claim.pages import ANSWERS, FINE_KINDS, KINDS, QUESTIONS, compose
from tools.claim.runs import check_arms
from tools.claim.scores import characters, difference, estimate, exact, scores, tuned_rate
from tools.claim.stores import repeat_global_view
from tools.claim.verbs import VerbError

CLAIM = Path(__file__).resolve().parents[2] / "tools" / "claim" / "claim.yaml"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_a_function_of_its_seed(kind: str) -> None:
    one, same, other = compose(kind, "train/1"), compose(kind, "train/1"), compose(kind, "train/2")
    assert one.picture.tobytes() == same.picture.tobytes() != other.picture.tobytes()
    assert one.picture.width == one.picture.height
    assert one.question in QUESTIONS
    assert one.answer in ANSWERS


def result(arm: str, answers: list[str], *, rate: float = 1e-3) -> dict[str, object]:
    expected = [{"kind": kind, "answer": text, "expected": "12"} for kind in KINDS for text in answers]
    return {
        "arm": arm,
        "learning_rate": rate,
        "tune": expected,
        "test": expected,
        "context_length": 16,
        "training_flops_per_sample": 2e8,
        "step_seconds": 0.5,
        "cache_bytes_per_sample": 1024.0,
    }


@pytest.mark.parametrize(
    ("given", "expected"), [("12", 1.0), ("13", 0.5), ("1", 0.5), ("123", 2 / 3), ("", 0.0), ("21", 0.0)]
)
def test_characters_count_place_by_place(given: str, expected: float) -> None:
    assert characters({"answer": given, "expected": "12"}) == pytest.approx(expected)


def test_an_interval_holds_the_mean_and_narrows_with_samples() -> None:
    few, many = np.tile([0.0, 1.0], (3, 10)), np.tile([0.0, 1.0], (3, 1000))
    assert (
        estimate(few).low < estimate(many).low < estimate(many).mean == 0.5 < estimate(many).high < estimate(few).high
    )


def test_a_difference_is_paired() -> None:
    first = np.random.default_rng(1).integers(0, 2, (3, 200)).astype(float)
    assert difference(first, first - 0.1).low == pytest.approx(0.1)


ABOVE = Finding("above", "a", "b", True)
CLOSE = Finding("at least", "a", "b", False)
NO_BETTER = Finding("no better", "a", "b", False, False)


@pytest.mark.parametrize(
    ("finding", "shift", "verdict"),
    [
        pytest.param(ABOVE, 0.2, "appears", id="above-and-is"),
        pytest.param(ABOVE, -0.2, "the opposite appears", id="above-and-is-below"),
        pytest.param(ABOVE, 0.0, "is not decided here", id="above-and-is-equal"),
        pytest.param(CLOSE, 0.0, "appears", id="close-and-is"),
        pytest.param(CLOSE, 0.5, "appears", id="close-and-is-above"),
        pytest.param(CLOSE, -0.5, "does not appear", id="close-and-is-below"),
        pytest.param(NO_BETTER, 0.5, "does not appear", id="no-better-and-is-better"),
        pytest.param(NO_BETTER, -0.5, "appears", id="no-better-and-is-worse"),
    ],
)
def test_verdicts(finding: Finding, shift: float, verdict: str) -> None:
    base = np.full((3, 100), 0.4)
    judged = judge(finding, {"a": base + shift, "b": base})
    assert judged is not None
    assert judged[1] == verdict


def test_the_rate_is_chosen_by_the_pages_for_tuning() -> None:
    results = [result("a", ["12", "no"], rate=1e-4), result("a", ["12", "12"], rate=1e-3), result("a", ["12", "12"])]
    results[2]["learning_rate"] = 1e-2
    assert tuned_rate(results) == 1e-3


@pytest.mark.parametrize("quick", [False, True])
def test_every_finding_is_about_arms_that_are_there(quick: bool) -> None:
    experiment = read_experiment(CLAIM, quick=quick)
    names = {arm.name for arm in experiment.arms}
    assert len({arm.folder for arm in experiment.arms}) == len(names)
    if not quick:
        assert {name for finding in FINDINGS for name in (finding.first, finding.second)} <= names


@pytest.mark.parametrize("quick", [False, True])
def test_every_arm_can_be_trained(quick: bool) -> None:
    check_arms(read_experiment(CLAIM, quick=quick))


def test_an_arm_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    changed = tmp_path / "claim.yaml"
    changed.write_text(CLAIM.read_text().replace("arms:\n", "arms:\n  mine: {model.stacks.slots: [3, 9]}\n", 1))
    with pytest.raises(VerbError, match=r"arm 'mine': .*2 slots"):
        check_arms(read_experiment(changed, quick=False))


def test_an_arm_is_one_line(tmp_path: Path) -> None:
    changed = tmp_path / "claim.yaml"
    changed.write_text(CLAIM.read_text().replace("arms:\n", "arms:\n  mine: {model.stacks.slots: [3, 3, 3, 3]}\n", 1))
    arms = {arm.name: arm for arm in read_experiment(changed, quick=False).arms}
    assert arms["mine"].fields == {"model.stacks.slots": [3, 3, 3, 3]}
    assert arms["mine"].store.name == "crops4"


def test_an_unknown_store_is_named(tmp_path: Path) -> None:
    changed = tmp_path / "claim.yaml"
    changed.write_text(CLAIM.read_text().replace("store: dummy", "store: crops9"))
    with pytest.raises(SystemExit, match="'crops9'"):
        read_experiment(changed, quick=False)


def test_dummy_stacks_repeat_the_global_view(tmp_path: Path) -> None:
    source = write_tiny_store(tmp_path / "source.zarr", layout=ViewLayout.CROPS)
    target = tmp_path / "target.zarr"
    repeat_global_view(source, target)
    old, new = Store.open(source), Store.open(target)
    for image in range(old.num_images):
        views = range(old.image(image).count)
        if views:
            assert (new.read_views(image, views) == old.read_views(image, [0])).all()
    assert old.plan_hash != new.plan_hash
    assert not verify(str(target), processes=1)


def test_the_pages_of_a_result(tmp_path: Path) -> None:
    experiment: Experiment = read_experiment(CLAIM, quick=True)
    chosen = {"L, 4 stacks": [result("L, 4 stacks", ["12", "12"])], "no stacks": [result("no stacks", ["12", "no"])]}
    write_pages(tmp_path, experiment, chosen, chosen, "make claim")
    document = json.loads((tmp_path / "claim.json").read_text())
    assert document["arms"][0]["exact"]["mean"] == 1.0
    assert "| L, 4 stacks | 100.0 (100.0 to 100.0) |" in (tmp_path / "claim.md").read_text()
    assert "no stacks</text>" in (tmp_path / "claim.svg").read_text()
    assert exact({"answer": "12", "expected": "12"}) == 1.0
    assert scores(chosen["no stacks"], exact, *FINE_KINDS).shape == (1, 6)
