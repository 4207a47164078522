"""How good the planner's figures are: published utilisations of H100s, and ratios of step times on this machine.

Published: Megatron-LM names model FLOPs utilisations of 47 % for 7.1B, 42 % for 70B and 47 % for 462B parameters on
H100s, with sequences of 4,096 tokens. The layouts below are the usual ones for these sizes; where Megatron's table is
only a picture they are an assumption. Its runs hide tensor-parallel messages behind products, which this package does
not do, and it gathers weights beside the forward pass. So the plan is made with `--overlapped-share` of all messages
hidden.

Ratios on one rank: a small model is trained on this machine in pairs of ways, and the ratio of their process CPU times
is compared with the predicted one.

Ratios of two ranks: the same with layouts of two ranks, for which the time of the clock counts, since ranks wait for
each other. The planner's CPU is given this machine's own speed of products and of gloo's messages between products,
measured in the same run: how fast a machine is, is no question to the planner. Two cores must be free for these.

The last line is one JSON object with the worst errors. Run on an idle machine: python tools/bench_plan.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_deepstack.config.choices import Batching, Part, Recompute
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.config.traits.variants import variant_without_crops
from megatron_deepstack.planning.budget.hardware import CPU, MACHINES, Machine
from megatron_deepstack.planning.budget.load import Shapes
from megatron_deepstack.planning.budget.run_plan import plan_run

LENGTH = 4096


@dataclass(frozen=True)
class Published:
    """A published run."""

    name: str
    language: LanguageConfig
    parallel: ParallelConfig
    gpus: int
    batch: int
    mfu: float


def language(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> LanguageConfig:
    """A decoder with Megatron's vocabulary of 131,072 tokens."""
    return LanguageConfig(
        vocab_size=131072,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


SP = {"sequence_parallel": True, "distributed_optimizer": True}
PUBLISHED = (
    Published("7.1B", language(32, 4096, 10880, 32, 32), ParallelConfig(distributed_optimizer=True), 256, 1024, 0.47),
    Published(
        "70B",
        language(80, 8192, 28672, 64, 8),
        ParallelConfig(tensor=4, pipeline=4, virtual_pipeline=5, **SP),
        512,
        512,
        0.42,
    ),
    Published(
        "462B",
        language(112, 18432, 49152, 144, 144),
        ParallelConfig(tensor=8, pipeline=16, virtual_pipeline=7, **SP),
        6144,
        1536,
        0.47,
    ),
)


def published_errors(overlapped: float) -> dict[str, tuple[float, float]]:
    """Predicted and published utilisation of each run."""
    found = {}
    machine = MACHINES["h100"]
    hidden = max(1 - overlapped, 1e-3)
    machine = replace(
        machine,
        node_bandwidth=machine.node_bandwidth / hidden,
        network_bandwidth=machine.network_bandwidth / hidden,
    )
    for one in PUBLISHED:
        recipe = Recipe(
            model=ModelConfig(language=one.language, variant=variant_without_crops()),
            parallel=one.parallel,
            train=TrainConfig(
                global_batch_size=one.batch,
                seq_length=LENGTH,
                batching=Batching.PACKED,
                trainable=(Part.LANGUAGE,),
            ),
        )
        none = np.zeros(one.batch, np.int64)
        shapes = Shapes(np.full(one.batch, LENGTH), none, none, "whole rows")
        found[one.name] = plan_run(recipe, shapes, machine, one.gpus).mfu, one.mfu
    return found


CPU_MODEL = ModelConfig(
    variant=variant_without_crops(),
    vision=VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=2, num_heads=2),
    language=LanguageConfig(vocab_size=2000, hidden_size=192, ffn_hidden_size=512, num_layers=4, num_heads=4),
)
NONE = ParallelConfig()
PAIRS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("recomputation of all layers", {"parallel": ParallelConfig(recompute=Recompute.FULL)}, {}),
    ("twice as many layers", {"layers": 8}, {}),
    ("twice as long samples", {"length": 512}, {"length": 256}),
    ("frozen decoder", {"trainable": (Part.PROJECTOR, Part.VISION)}, {}),
    ("a vocabulary of 16,000", {"vocabulary": 16000}, {}),
    ("twice as many samples", {"batch": 8}, {"batch": 4}),
)
_SEVERAL = {"layers": 8, "batch": 8}
_PP2, _DP2, _TP2 = ParallelConfig(pipeline=2), ParallelConfig(), ParallelConfig(tensor=2)
RANK_PAIRS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("one rank against PP 2", {"ranks": 1}, {"parallel": _PP2}),
    ("one rank against DP 2", {"ranks": 1}, {"parallel": _DP2}),
    ("one rank against TP 2", {"ranks": 1}, {"parallel": _TP2}),
    ("TP 2 against DP 2", {"parallel": _TP2}, {"parallel": _DP2}),
    ("PP 2 against DP 2", {"parallel": _PP2}, {"parallel": _DP2}),
    ("1F1B against two chunks a stage, PP 2", {"parallel": _PP2}, {"parallel": replace(_PP2, virtual_pipeline=2)}),
    ("PP 2, two micro-batches against eight", {"parallel": _PP2, "micro_batch": 4}, {"parallel": _PP2}),
)
"""Sides take 8 layers and 8 samples, and two ranks where nothing else is said."""


def pair_recipe(change: dict[str, Any]) -> tuple[Recipe, int]:
    """The recipe of one side of a pair, and the length of its samples."""
    decoder = replace(CPU_MODEL.language, num_layers=change.get("layers", 4), vocab_size=change.get("vocabulary", 2000))
    recipe = Recipe(
        model=replace(CPU_MODEL, language=decoder),
        parallel=change.get("parallel", NONE),
        train=TrainConfig(
            global_batch_size=change.get("batch", 4),
            micro_batch_size=change.get("micro_batch", 1),
            seq_length=1024,
            precision="fp32",  # type: ignore[arg-type]
            trainable=change.get("trainable", (Part.LANGUAGE, Part.PROJECTOR, Part.VISION)),
        ),
    )
    return recipe, int(change.get("length", 256))


def measured(rank: int, recipe: Recipe, length: int, repeats: int) -> tuple[float, list[float]]:
    """Of steps' forward and backward passes, the smallest process CPU seconds, and each one's seconds by the clock."""
    import torch.distributed as dist

    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import forward_backward
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.testing.tiny import TinySample, unit_pixels

    groups, train = groups_for(recipe.parallel), recipe.train
    model = build_model(recipe.model, recipe.parallel, train.precision, groups)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    random = np.random.default_rng(0)
    samples = [
        TinySample(random.integers(1, 60, length), np.ones(length, np.int64), (), ())
        for _ in range(train.global_batch_size)
    ]
    size, mine = train.micro_batch_size, samples[groups.place.dp :: groups.axes.dp]
    rows = [one.planned(recipe.model, train.seq_length) for one in mine]
    planned = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    plan = plan_step(recipe.model, recipe.parallel, planned, groups.replica_rank)
    pixels = unit_pixels(recipe.model, [[()] * len(batch) for batch in planned], plan)
    work, clock = [], []
    for _ in range(repeats + 1):
        dist.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        forward_backward(engine, plan, pixels, StepClock())
        work.append(time.process_time() - cpu)
        clock.append(time.perf_counter() - begin)
    return min(work[1:]), clock[1:]


def speed_here(rank: int) -> tuple[float, float, float]:
    """FLOP/s of a product as large as the model's, and seconds and bytes per second of sums over two ranks."""
    import torch
    import torch.distributed as dist

    from megatron_deepstack.parallel.reduce import sum_over_group

    everyone = dist.group.WORLD
    assert everyone is not None, "a pool's ranks are a world"

    def shortest(work: Callable[[], object], repeats: int) -> float:
        return min(_seconds(work) for _ in range(repeats))

    def between_products(message: Callable[[], object], repeats: int) -> float:
        """As in a step, where a rank comes to a message from other work, and the other one not at the same moment."""
        times = []
        for _ in range(repeats):
            for _ in range(4):
                left @ right
            times.append(_seconds(message))
        return statistics.median(times)

    left, right, small, large = (torch.ones(shape) for shape in ((256, 192), (192, 512), (1, 1), (2**20, 1)))
    product = shortest(lambda: left @ right, 200)
    latency = between_products(lambda: sum_over_group(small, everyone), 200)
    message = between_products(lambda: sum_over_group(large, everyone), 20) - latency
    return 2 * 256 * 192 * 512 / product, latency, large.nbytes / message


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def machine_here(pool: Any) -> Machine:
    """The planner's CPU with what two ranks measure of this machine; memory and calls keep their ratio to products."""
    found = pool.run(speed_here)
    flops = min(one[0] for one in found) / CPU.product_share
    latency, bandwidth = max(one[1] for one in found), min(one[2] for one in found)
    print(f"here: {flops / 1e9:.0f} GFLOP/s, messages {latency * 1e6:.0f} us and {bandwidth / 1e9:.2f} GB/s")
    return replace(
        CPU,
        fp32_flops=flops,
        bf16_flops=flops,
        memory_bandwidth=CPU.memory_bandwidth * flops / CPU.fp32_flops,
        operator_seconds=CPU.operator_seconds * CPU.fp32_flops / flops,
        latency=latency,
        node_bandwidth=bandwidth,
    )


def rank_ratios(repeats: int, pairs: int) -> dict[str, tuple[float, float]]:
    """Measured and predicted ratios of layouts of two ranks; a step takes as long as its slowest rank."""
    from megatron_deepstack.testing.ranks import RankPool

    found = {}
    with RankPool(1) as one, RankPool(2) as two:
        pools, machine = {1: one, 2: two}, machine_here(two)
        for name, *changes in RANK_PAIRS[:pairs]:
            sides = [(change.get("ranks", 2), *pair_recipe(_SEVERAL | change)) for change in changes]
            shortest = [float("inf")] * 2
            for _ in range(repeats):
                for place, (ranks, recipe, length) in enumerate(sides):
                    clocks = [clock for _, clock in pools[ranks].run(measured, recipe, length, 3)]
                    shortest[place] = min(shortest[place], *map(max, zip(*clocks, strict=True)))
            expected = [predicted(recipe, length, ranks, machine) for ranks, recipe, length in sides]
            found[name] = shortest[0] / shortest[1], expected[0] / expected[1]
            print(_said(name, *found[name]), flush=True)
    return found


def _said(name: str, ratio: float, wanted: float) -> str:
    return f"{name:38} {ratio:5.2f} times measured, {wanted:5.2f} predicted ({wanted / ratio - 1:+.0%})"


def predicted(recipe: Recipe, length: int, num_ranks: int = 1, machine: Machine = CPU) -> float:
    """The planner's seconds of the same, which is a step without its optimizer."""
    count = recipe.train.global_batch_size
    none = np.zeros(count, np.int64)
    shapes = Shapes(np.full(count, length), none, none, "equal samples")
    seconds = plan_run(recipe, shapes, machine, num_ranks).seconds
    return seconds.schedule + seconds.reduction


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each pair, of two steps a side")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="number of pairs measured on one rank")
    parser.add_argument("--rank-pairs", type=int, default=len(RANK_PAIRS), help="number of pairs of several ranks")
    parser.add_argument("--overlapped-share", type=float, default=0.5, help="share of messages that Megatron hides")
    asked = parser.parse_args()
    errors = []
    for name, (ours, theirs) in published_errors(asked.overlapped_share).items():
        errors.append(abs(ours / theirs - 1))
        print(f"{name:6} MFU predicted {ours:.1%}, published {theirs:.0%} ({ours / theirs - 1:+.0%})")
    from megatron_deepstack.testing.ranks import RankPool

    off = []
    with RankPool(1) as pool:
        for name, first, second in PAIRS[: asked.pairs]:
            sides = [pair_recipe(first), pair_recipe(second)]
            rounds = [[pool.run(measured, *side, 2)[0] for side in sides] for _ in range(asked.repeats)]
            found = [min(cpu for cpu, _ in times) for times in zip(*rounds, strict=True)]
            expected = [predicted(*side) for side in sides]
            ratio, wanted = found[0] / found[1], expected[0] / expected[1]
            off.append(abs(wanted / ratio - 1))
            print(_said(name, ratio, wanted), flush=True)
    of_ranks = rank_ratios(asked.repeats, asked.rank_pairs) if asked.rank_pairs else {}
    off_ranks = [abs(wanted / ratio - 1) for ratio, wanted in of_ranks.values()]
    worst = {"published_worst_error": errors, "ratio_worst_error": off, "rank_ratio_worst_error": off_ranks}
    found_ratios = {name: [round(ratio, 3), round(wanted, 3)] for name, (ratio, wanted) in of_ranks.items()}
    print(json.dumps({name: round(max(values, default=0.0), 3) for name, values in worst.items()} | found_ratios))


if __name__ == "__main__":
    main()
