"""What the output layer at target positions alone saves: step time and peak memory, at 15 % and 100 % targets.

A decoder of a few layers with a large vocabulary, whose head weighs as much as on the last stage of a small model. Each
row alternates the head at the targets with the head at all positions in one process. The last line is one JSON object
with, by share of targets, `time` (targets alone over everywhere, median of the pairs) and `memory` (the same of the
largest number of bytes of tensors that were alive). Run on an otherwise idle machine: python tools/bench_head.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig
from megatron_deepstack.config.traits.variants import variant_without_crops
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.testing.live_bytes import LiveBytes
from megatron_deepstack.testing.ranks import RankPool, groups_for

SHARES = (0.15, 1.0)

Measured = tuple[float, float, float, float]
"""Seconds and bytes at the targets alone, then everywhere."""


def compare(rank: int, repeats: int, share: float, vocabulary: int, length: int) -> list[Measured]:
    """Time forward and backward of one sequence with both heads, in turns.

    Args:
        rank: Number of this rank; there is one.
        repeats: Number of pairs.
        share: Share of positions that are targets.
        vocabulary: Rows of the head.
        length: Tokens of the sequence.

    Returns:
        What was measured, pair by pair.
    """
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.model.language import HeadTargets
    from megatron_deepstack.planning.batch.targets import find_targets

    language = LanguageConfig(vocab_size=vocabulary, hidden_size=512, ffn_hidden_size=1536, num_layers=2, num_heads=8)
    model = ModelConfig(variant=variant_without_crops(), language=language)
    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, random_source(model, 0), groups.decoder.tp)
    (chunk,) = built.chunks
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((1, length)) < share, rng.integers(1, vocabulary, (1, length)), IGNORE_INDEX)
    tokens = torch.randint(1, vocabulary, (1, length))
    found = find_targets(labels, 1)
    alone = HeadTargets(torch.from_numpy(found.rows[0]), torch.from_numpy(found.labels).clamp(min=0))
    everywhere = HeadTargets.everywhere(torch.from_numpy(labels).clamp(min=0))

    def step(targets: HeadTargets) -> float:
        begin = time.perf_counter()
        losses = chunk(tokens, targets)
        torch.autograd.backward(losses, torch.ones_like(losses))
        return time.perf_counter() - begin

    def peak(targets: HeadTargets) -> float:
        with LiveBytes(lambda tensor: True) as live:
            step(targets)
        return float(live.peak)

    bytes_alone, bytes_everywhere = peak(alone), peak(everywhere)
    pairs = [(step(alone), step(everywhere)) for _ in range(repeats)]
    return [(a, bytes_alone, b, bytes_everywhere) for a, b in pairs]


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="pairs of steps")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the head")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the sequence")
    asked = parser.parse_args()
    result = {}
    with RankPool(1) as pool:
        for share in SHARES:
            pairs = pool.run(compare, asked.repeats, share, asked.vocabulary, asked.length)[0]
            ratio = statistics.median(pair[0] / pair[2] for pair in pairs)
            alone, everywhere = (statistics.median(pair[k] for pair in pairs) for k in (0, 2))
            print(
                f"{share:.0%} targets: {alone:.3f} s and {pairs[0][1] / 1e6:.0f} MB at the targets alone, "
                f"{everywhere:.3f} s and {pairs[0][3] / 1e6:.0f} MB everywhere"
            )
            result[f"{share:.0%}"] = {"time": round(ratio, 3), "memory": round(pairs[0][1] / pairs[0][3], 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
