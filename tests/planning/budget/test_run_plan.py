"""Plans of shipped recipes: what fits, which knob helps, what layouts there are, and what bad input says."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest

from megatron_deepstack.config.choices import Recompute, Switch
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.budget.cost import training_flops
from megatron_deepstack.planning.budget.drawn import drawn_shapes
from megatron_deepstack.planning.budget.hardware import CPU, MACHINES, machine_named, machine_of_device
from megatron_deepstack.planning.budget.layouts import all_layouts, describe
from megatron_deepstack.planning.budget.load import Shapes
from megatron_deepstack.planning.budget.run_plan import advice, boxes, plan_run
from megatron_deepstack.planning.check import load_checked_recipe

RECIPE = load_recipe("deepstack_l_7b_finetune")
SHAPES = drawn_shapes(RECIPE)
H100 = MACHINES["h100"]


def test_the_shipped_layout_fits_and_its_parts_add_up() -> None:
    plan = plan_run(RECIPE, SHAPES, H100, 8)
    assert plan.fits
    assert 0.2 < plan.mfu < 0.6
    lengths = SHAPES.lengths.tolist()
    flops = training_flops(RECIPE.model, RECIPE.train.trainable, RECIPE.lora, lengths, int(SHAPES.units.sum()))
    assert plan.flops.total == pytest.approx(flops)
    for stage in range(len(plan.stages)):
        ends = [end for *_, end in boxes(plan, stage)]
        assert max(ends) <= plan.seconds.total * 1.0001
    assert plan.tokens_per_second * plan.seconds.total == pytest.approx(SHAPES.lengths.sum())


def test_what_does_not_fit_gets_a_knob_that_makes_it_fit() -> None:
    tight = replace(RECIPE, parallel=ParallelConfig(pipeline=2))
    plan = plan_run(tight, SHAPES, H100, 2)
    assert not plan.fits
    knob = advice(plan, SHAPES)
    assert knob
    helped = load_checked_recipe(
        "deepstack_l_7b_finetune", ["parallel.distributed_optimizer=false", "parallel.pipeline=2", *shlex.split(knob)]
    )
    assert plan_run(helped, SHAPES, H100, 2).fits


def test_replicas_that_share_the_optimizers_states_are_offered_first() -> None:
    """The recipe is made for eight ranks, and its one replica of two does not fit alone."""
    shipped = load_checked_recipe("deepstack_l_7b_finetune", [])
    plan = plan_run(shipped, SHAPES, H100, 2)
    assert not plan.fits
    ranks, override = advice(plan, SHAPES).split(" or ")
    assert ranks.startswith("--ranks ")
    assert plan_run(shipped, SHAPES, H100, int(ranks.split()[1])).fits
    assert plan_run(load_checked_recipe("deepstack_l_7b_finetune", shlex.split(override)), SHAPES, H100, 2).fits


def test_recomputation_saves_memory_and_costs_time() -> None:
    plain, again = (
        plan_run(replace(RECIPE, parallel=replace(RECIPE.parallel, recompute=kind)), SHAPES, H100, 8)
        for kind in (Recompute.NONE, Recompute.FULL)
    )
    assert again.fullest.memory.total < plain.fullest.memory.total
    assert again.seconds.total > plain.seconds.total


def test_all_layouts_are_ranked_and_the_others_have_reasons() -> None:
    found = all_layouts(RECIPE, SHAPES, H100, 6)
    times = [plan.seconds.total for plan in found.fitting]
    assert times == sorted(times)
    assert times
    assert all(one.reason for one in found.refused)
    assert found.refused, "three stages do not divide 32 layers"
    assert len({describe(plan.recipe.parallel, 6) for plan in found.fitting}) == len(found.fitting)
    for plan in found.fitting[:3]:
        alone = plan_run(plan.recipe, SHAPES, H100, 6)
        assert (alone.seconds, alone.stages, alone.flops) == (plan.seconds, plan.stages, plan.flops)
    small = all_layouts(RECIPE, SHAPES, H100, 1)
    assert not small.fitting
    assert all(not plan.fits for plan in small.too_large)


def test_drawn_samples_have_the_stated_mean() -> None:
    large = replace(RECIPE, train=replace(RECIPE.train, global_batch_size=4096))
    lengths = drawn_shapes(large).lengths
    assert np.mean(lengths) == pytest.approx(576 + 260, rel=0.03)
    assert np.array_equal(lengths, drawn_shapes(large).lengths)


@pytest.mark.parametrize(("name", "nearest"), [("h10", "h100"), ("A10", "a100"), ("tpu", "")])
def test_an_unknown_gpu_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one of h100, h200, a100, b200") as met:
        machine_named(name)
    assert not nearest or f"did you mean '{nearest}'?" in str(met.value)


def test_devices_by_their_drivers_name() -> None:
    assert machine_of_device("NVIDIA H100 80GB HBM3") is H100
    assert machine_of_device("AMD EPYC") is CPU


def test_text_alone_needs_no_encoder_time() -> None:
    none = np.zeros(128, np.int64)
    text = Shapes(np.full(128, 500), none, none, "text")
    plan = plan_run(RECIPE, text, H100, 8)
    assert plan.flops.encoder == 0
    assert plan.seconds.encode < 1e-3


def test_rows_on_the_host_are_bounded_whatever_the_number_of_micro_batches() -> None:
    """The first stage of four: on the device 13 GB of rows with one replica, 26 GB with twice the batch."""
    found: dict[Switch, list[int]] = {}
    for where in Switch:
        for batch in (128, 256):
            layout = ["parallel.pipeline=4", f"train.global_batch_size={batch}", f"parallel.rows_on_host={where}"]
            recipe = load_recipe("deepstack_hd_7b_finetune", layout)
            plan = plan_run(recipe, drawn_shapes(recipe), H100, 4)
            found.setdefault(where, []).append(plan.stages[0].memory.rows)
    once, twice = found[Switch.NEVER]
    assert 1.9 < twice / once < 2.1
    assert once > 8 * found[Switch.ALWAYS][0]
    assert found[Switch.ALWAYS][1] < 1.2 * found[Switch.ALWAYS][0]
    assert found[Switch.AUTO] == found[Switch.ALWAYS]
