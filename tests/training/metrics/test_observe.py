"""Steps seen closely: timelines of all ranks, profiles of chosen ones, and one clock for all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_deepstack.config.choices import EncoderPlacement, Recompute
from megatron_deepstack.config.schema import LoggingConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.parallel.host_clock import offsets_of
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.trial import run_trial

Pools = Callable[[int], RankPool]
PASSES = ("forward", "backward")


def observed(rank: int, recipe: Recipe) -> object:
    """`run_trial` with each of its steps under the observer; rank 0 returns the trial."""
    from megatron_deepstack.step import clock
    from megatron_deepstack.training.metrics.observe import Observer

    groups = groups_for(recipe.parallel)
    observer = Observer(recipe, groups)
    made = []

    class Watched(clock.StepClock):
        """The trial makes a clock per step; the step ends where the next is made, or with the trial."""

        def __init__(self) -> None:
            super().__init__()
            for earlier in made[-1:]:
                earlier.__exit__(None, None, None)
            made.append(observer.step(len(made) + 1, self))
            made[-1].__enter__()

    original, clock.StepClock = clock.StepClock, Watched
    try:
        trial = run_trial(rank, recipe)
        made[-1].__exit__(None, None, None)
    finally:
        clock.StepClock = original
    return trial


def recipe_in(folder: Path, parallel: ParallelConfig, **logging: object) -> Recipe:
    base = tiny_recipe(tiny_model(stacks=StackConfig(slots=(0, 0, 1, 1))), parallel)
    return replace(base, run_dir=str(folder), logging=LoggingConfig(**logging))  # type: ignore[arg-type]


LAYOUTS = [
    ("pp2", 2, ParallelConfig(pipeline=2)),
    ("pp2-vpp2", 2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("pp2-inline", 2, ParallelConfig(pipeline=2, encoder_placement=EncoderPlacement.INLINE)),
    ("pp2-recompute", 2, ParallelConfig(pipeline=2, recompute=Recompute.FULL)),
    ("one", 1, ParallelConfig()),
]


@pytest.mark.parametrize(("num_ranks", "parallel"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_timeline_holds_every_pass_once(ranks: Pools, tmp_path: Path, num_ranks: int, parallel: ParallelConfig) -> None:
    """Each rank, micro-batch and chunk has one forward and one backward, in the order of the data's way."""
    recipe = recipe_in(tmp_path, parallel, timeline_steps=(2,))
    ranks(num_ranks).run(observed, recipe)
    assert [file.name for file in tmp_path.iterdir()] == ["timeline_step_2.json"]
    document = json.loads((tmp_path / "timeline_step_2.json").read_text())
    assert document["step"] == 2
    assert document["clock_error_seconds"] == 0.0
    assert [rank["rank"] for rank in document["ranks"]] == list(range(num_ranks))
    chunks, num_micro = parallel.virtual_pipeline, recipe.train.global_batch_size
    times = {}
    for rank in document["ranks"]:
        found = Counter((kind, m, chunk) for kind, m, chunk, *_ in rank["intervals"] if kind in PASSES)
        assert found == {(kind, m, chunk): 1 for kind in PASSES for m in range(num_micro) for chunk in range(chunks)}
        for kind, m, chunk, begin, end in rank["intervals"]:
            assert 0 <= begin <= end
            times[rank["pp"], kind, m, chunk] = begin, end
    last = num_ranks - 1
    for m in range(num_micro):
        assert times[0, "forward", m, 0][1] <= times[last, "forward", m, chunks - 1][1]
        assert times[last, "forward", m, chunks - 1][1] <= times[last, "backward", m, chunks - 1][0]
        assert times[last, "backward", m, chunks - 1][0] <= times[0, "backward", m, 0][0]


@pytest.mark.parametrize("placement", list(EncoderPlacement))
def test_timeline_tells_the_encoder_apart(ranks: Pools, tmp_path: Path, placement: EncoderPlacement) -> None:
    """Spread: before and after the schedule, on every rank. Inline: in each micro-batch, on the first stage alone."""
    recipe = recipe_in(tmp_path, ParallelConfig(pipeline=2, encoder_placement=placement), timeline_steps=(1,))
    ranks(2).run(observed, recipe)
    document = json.loads((tmp_path / "timeline_step_1.json").read_text())
    assert document["encoder_placement"] == placement
    for rank in document["ranks"]:
        found = [(kind, m) for kind, m, *_ in rank["intervals"] if kind in ("encode", "encoder backward")]
        if placement is EncoderPlacement.SPREAD:
            assert found == [("encode", None), ("encoder backward", None)]
        elif rank["pp"] == 0:
            micro_batches = {m for _, m in found}
            assert None not in micro_batches
            assert sorted(found) == sorted((kind, m) for m in micro_batches for kind in ("encode", "encoder backward"))
            assert 2 <= len(micro_batches) <= recipe.train.global_batch_size  # one in four samples has no image
        else:
            assert not found


def test_observing_changes_nothing(ranks: Pools, tmp_path: Path) -> None:
    layout = ParallelConfig(pipeline=2, virtual_pipeline=2)
    recipe = recipe_in(tmp_path, layout, timeline_steps=(1, 2, 3), profile_steps=(2,), profile_ranks=(1,))
    seen, plain = ranks(2).run(observed, recipe)[0], ranks(2).run(run_trial, recipe)[0]
    assert seen.losses == plain.losses
    assert seen.gradient_norms == plain.gradient_norms


def test_profiles_of_chosen_steps_and_ranks(ranks: Pools, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, ParallelConfig(pipeline=2), profile_steps=(1, 3), profile_ranks=(1,))
    ranks(2).run(observed, recipe)
    files = sorted(file.name for file in (tmp_path / "profile").iterdir())
    assert files == ["rank_1_step_1.json", "rank_1_step_3.json"]
    trace = json.loads((tmp_path / "profile" / files[0]).read_text())
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= {event.get("name") for event in trace["traceEvents"]}


def test_clocks_that_differ_are_brought_together() -> None:
    """Rank 1 is 5 ms ahead and leaves the barrier up to 20 us late; one meeting of rank 2 was 1 ms late."""
    first = [1_000_000_000 * m for m in range(1, 6)]
    ahead = [t + 5_000_000 + late for t, late in zip(first, (0, 10_000, 20_000, 0, 10_000), strict=True)]
    late = [t - 7_000_000 for t in first[:-1]] + [first[-1] - 6_000_000]
    offsets = offsets_of([first, ahead, late])
    assert [offset.ns for offset in offsets] == [0, 5_010_000, -7_000_000]
    assert [offset.spread_ns for offset in offsets] == [0, 10_000, 500_000]
