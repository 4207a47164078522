"""A step's data sent ahead: the same step as with what is sent when it is needed, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megatron_deepstack.config.choices import Batching, EncoderPlacement
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_recipe

Pools = Callable[[int], RankPool]


def packed(**parallel: object) -> Recipe:
    recipe = tiny_recipe(parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    return replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=128))


CASES = {
    "padded": (1, tiny_recipe()),
    "packed-cp2": (2, packed(context=2)),
    "tp2-sp": (2, tiny_recipe(parallel=ParallelConfig(tensor=2, sequence_parallel=True))),
    "inline": (1, tiny_recipe(parallel=ParallelConfig(encoder_placement=EncoderPlacement.INLINE))),
    "packed-inline": (1, packed(encoder_placement=EncoderPlacement.INLINE)),
}


def losses_and_uploads(rank: int, recipe: Recipe) -> tuple[list[float], list[list[float]], list[int]]:
    """Losses and gradient sums of the same step: sent at once, sent by a thread, and by hand from its arrays; then
    how many transfers a step needs."""
    import torch

    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.platform.compute import upload
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.staging import StagedStep
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.testing.tiny import tiny_samples, tiny_share, unit_pixels

    train, groups = recipe.train, groups_for(recipe.parallel)
    model = build_model(recipe.model, recipe.parallel, train.precision, groups)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    batch = tiny_samples(recipe.model, train.global_batch_size, 3)
    planned, images = tiny_share(batch, recipe, 0, 1, False)
    is_packed = train.batching is Batching.PACKED
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank, packed=is_packed)
    pixels = unit_pixels(recipe.model, images, plan)

    begun: list[int] = []
    original = upload.Upload.__init__

    def counted(self: upload.Upload, tensors: list[torch.Tensor]) -> None:
        begun.append(len(tensors))
        original(self, tensors)

    upload.Upload.__init__ = counted  # type: ignore[method-assign, assignment]
    found: tuple[list[float], list[list[float]]] = ([], [])
    try:
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(StagedStep, engine, plan, pixels).result()
        for data in (pixels, ahead):
            found[0].append(forward_backward(engine, plan, data, StepClock()).mean)
            found[1].append(
                [float(p.main_grad.double().sum()) for d in engine.wrapped for p in d.parameters() if p.requires_grad]
            )
    finally:
        upload.Upload.__init__ = original  # type: ignore[method-assign]
    return *found, begun


@pytest.mark.parametrize(("num_ranks", "recipe"), CASES.values(), ids=CASES)
def test_sent_ahead_equals_sent_when_needed(ranks: Pools, num_ranks: int, recipe: Recipe) -> None:
    for losses, gradients, begun in ranks(num_ranks).run(losses_and_uploads, recipe):
        assert losses[0] == losses[1]
        assert gradients[0] == gradients[1]
        assert len(begun) == 2, "a step's data are one transfer"


def test_another_plan_is_refused(ranks: Pools) -> None:
    (said,) = ranks(1).run(refusal_of_another_plan, tiny_recipe())
    assert said == "another step was staged"


def refusal_of_another_plan(rank: int, recipe: Recipe) -> str:
    """What is said where the staged step is not the one to compute."""
    from types import SimpleNamespace

    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.staging import StagedStep
    from megatron_deepstack.step.train_step import forward_backward

    staged = StagedStep.__new__(StagedStep)
    staged.plan = object()  # type: ignore[assignment]
    try:
        forward_backward(SimpleNamespace(), SimpleNamespace(), staged, StepClock())  # type: ignore[arg-type]
    except AssertionError as error:
        return str(error)
    return ""
