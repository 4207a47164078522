"""How full rows are and how even replicas: packers compared over drawn steps of three length distributions.

`plan` is what training uses (`planning.batch.dealing`), which packs the whole batch and deals rows to replicas. `own`
packs each replica's share of the batch by first fit decreasing, `first` packs the whole batch that way, and `best` by
best fit decreasing. A figure is the mean over all steps of the rows on the replica with the most rows, divided by the
lower bound: the tokens of the batch, or the rows that its samples force (`packer.fewest_rows`), per replica.

The last line is one JSON object: the worst of these means (`over_bound`), the worst mean time of planning a step of
4,096 samples (`plan_ms`, process CPU time), and the worst mean imbalance of decoder and encoder work.
Run on an otherwise idle machine: python tools/bench_balance.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, TrainConfig
from megatron_deepstack.planning.batch.dealing import deal
from megatron_deepstack.planning.batch.packer import best_fit_decreasing, fewest_rows

Draw = Callable[[np.random.Generator, int], np.ndarray]
CAPACITY = 4096
LARGE = 4096
BATCHES = ((128, 1), (128, 4), (128, 16), (256, 32), (512, 64), (LARGE, 128))
"""Samples of the global batch, and replicas."""


def captions(random: np.random.Generator, count: int) -> np.ndarray:
    """One image of 576 tokens and a short text."""
    return 576 + random.integers(10, 80, count)


def instructions(random: np.random.Generator, count: int) -> np.ndarray:
    """Like LLaVA's 665K mix: mean 836 tokens, a tenth of the samples without an image, and a long tail."""
    images = random.random(count) < 0.94
    return np.clip(576 * images + np.exp(random.normal(5.31, 0.77, count)), 16, CAPACITY).astype(np.int64)


def documents(random: np.random.Generator, count: int) -> np.ndarray:
    """Evenly 500 to 4000 tokens."""
    return random.integers(500, 4001, count)


DISTRIBUTIONS: dict[str, Draw] = {"captions": captions, "instructions": instructions, "documents": documents}


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The number of rows that first fit decreasing needs."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row, left in enumerate(room) if left >= length), None)
        if row is None:
            room.append(capacity - length)
        else:
            room[row] -= length
    return len(room)


@dataclass(slots=True)
class Found:
    """What each step gave, by packer and measure."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        """Keep one value."""
        self.ratios.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        """The mean over steps."""
        return float(np.mean(self.ratios[name]))


def compare(draw: Draw, count: int, replicas: int, steps: int, others: int) -> Found:
    """Plan drawn steps; of the first `others` steps the other packers are tried too."""
    train = TrainConfig(global_batch_size=count, seq_length=CAPACITY, batching=Batching.PACKED)
    random, found, language = np.random.default_rng(count + replicas), Found(), LanguageConfig()
    for step in range(steps):
        lengths = draw(random, count)
        units = np.where(lengths > 576, 1 + 4 * random.integers(0, 2, count), 0)
        begin = time.process_time()
        dealt = deal(lengths, units, language, ParallelConfig(), train, replicas)
        found.seconds.append(time.process_time() - begin)
        tokens = lengths.tolist()
        bound = -(-fewest_rows(tokens, CAPACITY) // replicas)
        found.add("plan", len(dealt.replicas[0]) / bound)
        encoder = [sum(units[list(row)].sum() for (row,) in mine) for mine in dealt.replicas]
        found.add("decoder", dealt.balance.imbalance)
        found.add("encoder", max(encoder) / np.mean(encoder) - 1 if any(encoder) else 0.0)
        found.add("padding", dealt.balance.padding)
        if step < others:
            order = sorted(range(count), key=lambda one: -tokens[one])
            own = max(first_fit_decreasing(tokens[dp::replicas], CAPACITY) for dp in range(replicas))
            found.add("own", own / bound)
            found.add("first", -(-first_fit_decreasing(tokens, CAPACITY) // replicas) / bound)
            found.add("best", -(-len(best_fit_decreasing(order, tokens, CAPACITY)) // replicas) / bound)
    return found


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps drawn of each distribution and batch")
    parser.add_argument("--large-steps", type=int, default=50, help="the same of the batch of 4,096 samples")
    asked = parser.parse_args()
    print("rows of the slowest replica / lower bound; busiest replica above the mean; padding; CPU time of a plan")
    print("lengths       batch  replicas    own  first   best   plan   decoder  encoder  padding       ms")
    worst = {"over_bound": 0.0, "plan_ms": 0.0, "decoder_imbalance": 0.0, "encoder_imbalance": 0.0}
    for name, draw in DISTRIBUTIONS.items():
        for count, replicas in BATCHES:
            steps = asked.large_steps if count == LARGE else asked.steps
            found = compare(draw, count, replicas, steps, others=min(steps, 5 if count == LARGE else 200))
            ratios = "  ".join(f"{found.mean(packer):5.3f}" for packer in ("own", "first", "best", "plan"))
            shares = "  ".join(f"{found.mean(one):7.2%}" for one in ("decoder", "encoder", "padding"))
            milliseconds = 1e3 * float(np.mean(found.seconds))
            print(f"{name:12} {count:6} {replicas:9}  {ratios}  {shares}  {milliseconds:7.2f}", flush=True)
            worst["over_bound"] = max(worst["over_bound"], found.mean("plan"))
            worst["decoder_imbalance"] = max(worst["decoder_imbalance"], found.mean("decoder"))
            worst["encoder_imbalance"] = max(worst["encoder_imbalance"], found.mean("encoder"))
            if count == LARGE:
                worst["plan_ms"] = max(worst["plan_ms"], milliseconds)
    print(json.dumps({name: round(value, 4) for name, value in worst.items()}))


if __name__ == "__main__":
    main()
