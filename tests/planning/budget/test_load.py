"""What a step consists of: drawn samples of every kind of model, and the share of the rank that encodes most."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_parameters import QFORMERS

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.planning.budget.cost import EncoderWork, encoder_flops, training_flops, unit_flops
from megatron_deepstack.planning.budget.drawn import drawn_shapes
from megatron_deepstack.planning.budget.hardware import MACHINES
from megatron_deepstack.planning.budget.load import Shapes, Views, rows_per_unit, step_load
from megatron_deepstack.planning.budget.run_plan import plan_run
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl, tiny_recipe

NATIVE = tiny_qwen3_vl()
H100 = MACHINES["h100"]


def native_recipe(**data: object) -> Recipe:
    recipe = tiny_recipe(NATIVE, global_batch_size=512)
    train = replace(recipe.train, seq_length=1 << 16)
    return replace(recipe, data=replace(recipe.data, **data), train=train)  # type: ignore[arg-type]


def test_drawn_views_have_the_stated_area_and_keep_its_limits() -> None:
    recipe = native_recipe(min_pixels=64, max_pixels=1 << 20, expected_image_pixels=20_000, expected_images=1.5)
    shapes = drawn_shapes(recipe)
    views = shapes.views
    assert views is not None
    pixels = views.frame * NATIVE.vision.patch_size**2
    assert pixels.mean() == pytest.approx(20_000, rel=0.1)
    assert len(views.owner) / 512 == pytest.approx(1.5, abs=0.1)
    small = drawn_shapes(replace(recipe, data=replace(recipe.data, max_pixels=10_000))).views
    assert small is not None
    assert (small.frame * 16).max() <= 10_000
    tokens = np.bincount(views.owner, views.frame // NATIVE.vision.merge_size**2, 512)
    assert np.array_equal(shapes.units, tokens)
    assert shapes.targets is not None
    assert np.array_equal(shapes.lengths, tokens + shapes.targets)


def of_views(*grids: tuple[int, int]) -> Shapes:
    """One sample for each view."""
    height, width = np.array(grids).T
    units = height * width // NATIVE.vision.merge_size**2
    owner = np.arange(len(grids))
    return Shapes(units + 10, units, units, "given", Views(owner, np.ones_like(owner), height, width))


def test_a_huge_view_stays_on_one_rank() -> None:
    recipe = tiny_recipe(NATIVE, ParallelConfig(pipeline=4), global_batch_size=5)
    load = step_load(recipe, of_views((40, 40), (4, 4), (4, 4), (4, 6), (6, 4)), 1)
    assert (load.share.views, load.share.patches, load.share.squares) == (1, 1600, 1600**2)
    assert load.total_work.patches == 1600 + 16 + 16 + 24 + 24
    alike = step_load(replace(recipe, train=replace(recipe.train, global_batch_size=8)), of_views(*[(8, 8)] * 8), 1)
    assert (alike.share.views, alike.share.patches) == (2, 128)
    assert set(alike.rows_per_unit.values()) == {1.0}


def test_work_of_views_adds_up_to_that_of_each() -> None:
    """As the step's own plan counts it, forward and with backward."""
    grids = [ViewGrid(1, 8, 6), ViewGrid(2, 4, 4), ViewGrid(1, 40, 2)]
    work = EncoderWork.of_grids(NATIVE, grids)
    assert sum(encoder_flops(NATIVE, work)) == pytest.approx(sum(unit_flops(NATIVE, grid) for grid in grids))
    recipe = tiny_recipe(NATIVE, global_batch_size=2)
    plan = plan_run(recipe, of_views((8, 6), (40, 2)), H100, 1)
    lengths = [8 * 6 // 4 + 10, 40 * 2 // 4 + 10]
    chosen = [grids[0], grids[2]]
    assert plan.flops.total == pytest.approx(training_flops(NATIVE, tuple(Part), recipe.lora, lengths, 0, chosen))


def test_attention_within_a_view_costs_its_square() -> None:
    one, four = (plan_run(tiny_recipe(NATIVE, global_batch_size=4), of_views(*grids), H100, 1) for grids in (
        [(32, 32)] + [(2, 2)] * 3, [(16, 16)] * 4))  # fmt: skip
    assert one.load.share.patches == pytest.approx(four.load.share.patches, rel=0.02)
    assert one.flops.encoder > four.flops.encoder


def test_tiles_with_q_formers_are_planned() -> None:
    recipe = tiny_recipe(QFORMERS, global_batch_size=64)
    recipe = replace(recipe, train=replace(recipe.train, seq_length=4096))
    plan = plan_run(recipe, drawn_shapes(recipe), H100, 1)
    assert plan.fits
    side = QFORMERS.vision.image_size // QFORMERS.vision.patch_size // 2
    wide, high = 2 * side, round(2 * side * 480 / 640)  # of a photo's mosaic of 2x2 tiles; each line has a newline
    rows = (side**2 + high * (wide + 1)) / 5
    assert rows_per_unit(QFORMERS) == dict.fromkeys((0, 3, 5), pytest.approx(rows))
    linears = plan_run(replace(recipe, model=tiny_model()), drawn_shapes(replace(recipe, model=tiny_model())), H100, 1)
    assert plan.stages[0].memory.encoder > linears.stages[0].memory.encoder


def test_logits_are_those_of_targets() -> None:
    recipe = tiny_recipe(global_batch_size=4)
    lengths, none = np.full(4, 200), np.zeros(4, np.int64)
    everywhere = plan_run(recipe, Shapes(lengths, none, none, "all"), H100, 1)
    some = plan_run(recipe, Shapes(lengths, none, none, "some", targets=np.full(4, 20)), H100, 1)
    assert everywhere.stages[0].memory.logits == 200 * 128 * 4
    assert some.stages[0].memory.logits == 32 * 128 * 4, "rounded up to a multiple of 16"
    assert some.seconds.total < everywhere.seconds.total
