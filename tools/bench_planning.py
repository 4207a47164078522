"""What planning a step costs one rank, in process CPU time, by layout: the whole plan from expanded samples to routes.

Samples are like LLaVA's: one image on a 2x2 grid (576 base tokens, stacks of 576) and 200 to 600 tokens of text; packed
into rows of 4,096 where the table says so. The last line is one JSON object with the seconds of each layout and the
`worst`. Run on an otherwise idle machine: python tools/bench_planning.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.planning.batch.packer import pack
from megatron_deepstack.planning.batch.packing import merge
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.step_plan import plan_step
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length

GRID = (2, 2)
SEQ_LENGTH = 4096
RECIPES = ("deepstack_l_7b_finetune", "deepstack_hd_7b_finetune")
LAYOUTS = (
    ParallelConfig(),
    ParallelConfig(pipeline=4),
    ParallelConfig(tensor=8, pipeline=2),
    ParallelConfig(tensor=8, pipeline=2, sequence_parallel=True),
    ParallelConfig(tensor=8, pipeline=8),
    ParallelConfig(tensor=8, pipeline=8, sequence_parallel=True),
    ParallelConfig(tensor=8, pipeline=2, context=2, sequence_parallel=True),
)


def samples(model: ModelConfig, count: int) -> list[PlannedSample]:
    """Samples of one image each, drawn from a fixed seed.

    Args:
        model: The model that they are planned for.
        count: How many.
    """
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        tokens = random.integers(3, 1000, int(random.integers(200, 600)))
        tokens[35] = IMAGE_TOKEN_ID
        context = context_length(model, GRID)
        sequence = expand(str(number), tokens, np.ones_like(tokens), [context], seq_length=SEQ_LENGTH, truncate=True)
        found.append(PlannedSample(sequence=sequence, grids=(GRID,)))
    return found


def packed(planned: list[PlannedSample]) -> list[list[PlannedSample]]:
    """Rows of at most `SEQ_LENGTH` tokens, each a micro-batch."""
    return [[merge([planned[i] for i in row])] for row in pack([s.sequence.length for s in planned], SEQ_LENGTH)]


def seconds(model: ModelConfig, parallel: ParallelConfig, batches: list[list[PlannedSample]], rank: int) -> float:
    """CPU seconds of this process for one rank's plan.

    Args:
        model: The recipe's model.
        parallel: The layout.
        batches: Packed samples by micro-batch.
        rank: Number of the rank within its replica.

    Returns:
        The median of three plans, after one that fills caches.
    """
    times = []
    for _ in range(4):
        begin = time.process_time()
        plan_step(model, parallel, batches, rank, packed=True)
        times.append(time.process_time() - begin)
    return statistics.median(times[1:])


def describe(parallel: ParallelConfig) -> str:
    """The layout in words of the README."""
    axes = (("TP", parallel.tensor), ("CP", parallel.context), ("PP", parallel.pipeline))
    text = " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one rank"
    return text + (" SP" if parallel.sequence_parallel else "")


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="samples of a replica and step")
    count = parser.parse_args().samples
    found: dict[str, dict[str, float]] = {}
    for name in RECIPES:
        model = load_recipe(name).model
        batches = packed(samples(model, count))
        for parallel in LAYOUTS:
            ranks = parallel.tensor * parallel.context * parallel.pipeline
            # The first rank has the embedding, and with the published slots all rows; the last has none.
            by_rank = [seconds(model, parallel, batches, rank) for rank in sorted({0, ranks // 2, ranks - 1})]
            found.setdefault(name, {})[describe(parallel)] = round(max(by_rank), 4)
            print(f"{name:28} {describe(parallel):24} {max(by_rank):7.3f} s (slowest of ranks looked at)")
    worst = max(value for times in found.values() for value in times.values())
    print(json.dumps({"samples": count, "seconds": found, "worst": worst}))


if __name__ == "__main__":
    main()
