"""CUDA graphs of layers with a stand-in for their capture: what is captured, what is replayed, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_deepstack.config.choices import RowLength, Switch
from megatron_deepstack.config.schema import ParallelConfig, Recipe, SpeedConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.step import layer_graphs
from megatron_deepstack.step.layer_graphs import LayerGraphs, one_forward_one_backward
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl, tiny_recipe
from megatron_deepstack.testing.trial import Trial, run_trial

Pools = Callable[[int], RankPool]
STEPS = 4


@dataclass
class Recorded:
    """What the stand-in was asked for."""

    order: list[int]
    num_layers: int
    kwargs: set[str]
    replays: int = 0


class _Begin(torch.autograd.Function):
    """Marks a graph as free again when its backward pass is over."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, busy: set[int], keys: tuple[int, ...]) -> torch.Tensor:
        ctx.busy, ctx.keys = busy, keys
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.busy.difference_update(ctx.keys)
        return grads[0], None, None


def stand_in(recorded: list[Recorded]) -> Callable[..., tuple[Callable[..., Any], ...]]:
    """As Transformer Engine's function: layers run as they are written, and inputs must have the captured shapes.

    A graph and its buffer for the input must be free when they are replayed.
    """

    def make(
        layers: tuple[Any, ...], sample_args: tuple[Any, ...], *, sample_kwargs: tuple[Any, ...], **rest: Any
    ) -> tuple[Callable[..., Any], ...]:
        number = len(sample_args) // len(layers)
        assert rest["_order"].count(1) == rest["_order"].count(-1) == number
        recorded.append(Recorded(rest["_order"], len(layers), set(sample_kwargs[0])))
        busy: set[int] = set()

        def graph(index: int) -> Callable[..., Any]:
            layer, (sample,), kept = layers[index % len(layers)], sample_args[index], sample_kwargs[index]
            keys = (id(sample), ~index)

            def replay(hidden: torch.Tensor, **kwargs: Any) -> Any:
                assert not busy & set(keys), "a graph or its buffer is still needed by a backward pass"
                assert hidden.shape == sample.shape
                assert hidden.dtype == sample.dtype
                assert {name: value.shape for name, value in kwargs.items()} == {
                    name: value.shape for name, value in kept.items()
                }
                recorded[-1].replays += 1
                if hidden.requires_grad:
                    busy.update(keys)
                    hidden = _Begin.apply(hidden, busy, keys)
                return layer._te_cuda_graph_capture(hidden, **kwargs)

            return replay

        for layer, (sample,), kwargs in zip(layers, sample_args, sample_kwargs, strict=False):
            (output,) = layer(sample, **kwargs)  # Megatron's __call__, which takes the way of a capture
            output.sum().backward()
            for parameter in layer.parameters():  # Transformer Engine puts back what was there
                parameter.grad = None
        return tuple(graph(index) for index in range(len(sample_args)))

    return make


def run_graphed(rank: int, recipe: Recipe) -> tuple[Trial | None, list[Recorded]]:
    """A trial whose layers are captured, as on a GPU with Transformer Engine."""
    from megatron_deepstack.model import build

    decide, recorded = build.decide_speed, []  # type: ignore[var-annotated]
    capture = layer_graphs._engines_capture
    build.decide_speed = lambda *args, **kwargs: replace(decide(*args, **kwargs), cuda_graphs=True)
    layer_graphs._engines_capture = lambda: stand_in(recorded)
    try:
        return run_trial(rank, recipe), recorded
    finally:
        build.decide_speed, layer_graphs._engines_capture = decide, capture


CASES = [
    pytest.param(1, ParallelConfig(), id="one", marks=pytest.mark.slow),
    pytest.param(2, ParallelConfig(pipeline=2), id="pp2"),
    pytest.param(2, ParallelConfig(tensor=2, sequence_parallel=True), id="tp2-sp", marks=pytest.mark.slow),
    pytest.param(4, ParallelConfig(pipeline=2, distributed_optimizer=True), id="pp2-dp2", marks=pytest.mark.slow),
]


def full(recipe: Recipe) -> Recipe:
    train = replace(recipe.train, row_length=RowLength.FULL, seq_length=64, steps=STEPS)
    return replace(recipe, train=train, speed=SpeedConfig(overlap_param_gather=Switch.NEVER))


MODELS = [
    pytest.param(tiny_model(), id="deepstack"),
    pytest.param(tiny_qwen3_vl(), id="three-axes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("num_ranks", "parallel"), CASES)
def test_training_is_the_same_with_its_stacks(
    ranks: Pools, num_ranks: int, parallel: ParallelConfig, model: Any
) -> None:
    recipe = full(tiny_recipe(model, parallel))
    expected: Trial = ranks(num_ranks).run(run_trial, recipe)[0]
    found = ranks(num_ranks).run(run_graphed, recipe)
    actual = found[0][0]
    assert actual is not None
    assert actual.losses == expected.losses
    assert all(torch.equal(actual.parameters[name], value) for name, value in expected.parameters.items())
    for stage, (_, recorded) in enumerate(found[:: num_ranks // parallel.pipeline]):
        (one,) = recorded
        number = one.order.count(1)
        assert one.kwargs == {"rotary_pos_emb"}, "no rows of stacks, whose number differs"
        assert one.order == one_forward_one_backward(stage, parallel.pipeline, number)
        assert one.replays % one.num_layers == 0
        assert one.replays >= (STEPS - layer_graphs.PLAIN_STEPS) * one.num_layers * number


def test_orders() -> None:
    assert one_forward_one_backward(0, 1, 1) == [1, -1]
    assert one_forward_one_backward(0, 3, 4) == [1, 1, 1, -1, 1, -1, -1, -1]
    assert one_forward_one_backward(2, 3, 2) == [1, -1, 1, -1]
    assert one_forward_one_backward(0, 4, 2) == [1, 1, -1, -1]


def test_a_step_of_another_shape_is_refused() -> None:
    chunk: Any = SimpleNamespace(decoder=SimpleNamespace(layers=[]))
    graphs = LayerGraphs(chunk, 0, 1)
    plan: Any = SimpleNamespace(num_micro_batches=4, micro_batch_size=1, seq_lengths=(8,) * 4)
    for _ in range(layer_graphs.PLAIN_STEPS + 2):
        graphs.before_step(plan)
    with pytest.raises(AssertionError, match=r"captured for \(micro-batches, samples of each, lengths\) \(4, 1, "):
        graphs.before_step(SimpleNamespace(num_micro_batches=3, micro_batch_size=1, seq_lengths=(8,) * 3))  # type: ignore[arg-type]
    mixed: Any = SimpleNamespace(num_micro_batches=2, micro_batch_size=1, seq_lengths=(8, 9))
    graphs = LayerGraphs(chunk, 0, 1)
    for _ in range(layer_graphs.PLAIN_STEPS):
        graphs.before_step(mixed)
    with pytest.raises(AssertionError, match="different lengths"):
        graphs.before_step(mixed)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_moves_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:True")
    chunk: Any = SimpleNamespace(decoder=SimpleNamespace(layers=[]))
    with pytest.raises(ConfigError, match=r"set the variable NCCL_GRAPH_REGISTER=0, or speed\.cuda_graphs=never"):
        LayerGraphs(chunk, 0, 1)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    LayerGraphs(chunk, 0, 1)
