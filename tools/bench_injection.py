"""What the injection costs: a decoder's step with four stacks against the same step without, ViT left out.

Alternates both in one process and compares pair by pair. The last line is one JSON object with `overhead`, the median
of (with - without) / without. Run on an otherwise idle machine: python tools/bench_injection.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.testing.ranks import RankPool, groups_for

VISUAL, LENGTH = 576, 704


def compare(rank: int, repeats: int, hidden: int) -> list[tuple[float, float]]:
    """Time forward and backward of one sequence with stacks and without, in turns.

    Args:
        rank: Number of this rank; there is one.
        repeats: Number of pairs.
        hidden: Width of the decoder.

    Returns:
        Seconds (with stacks, without), pair by pair.
    """
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.model.language import HeadTargets, VisualInputs

    language = LanguageConfig(
        vocab_size=512, hidden_size=hidden, ffn_hidden_size=hidden * 11 // 4, num_layers=8, num_heads=16
    )
    model = ModelConfig(language=language, stacks=StackConfig())
    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, random_source(model, 0), groups.decoder.tp)
    (chunk,) = built.chunks
    tokens = torch.randint(1, language.vocab_size, (1, LENGTH))
    positions = torch.arange(VISUAL) + 35
    base = torch.randn(VISUAL, hidden, requires_grad=True)
    stacks = torch.randn(4, VISUAL, hidden, requires_grad=True)
    inputs = (
        VisualInputs(base, positions, stacks, positions.expand(4, -1).contiguous()),
        VisualInputs(base, positions),
    )

    def seconds(visual: VisualInputs) -> float:
        begin = time.perf_counter()
        losses = chunk(tokens, HeadTargets.everywhere(tokens), visual)
        torch.autograd.backward(losses, torch.ones_like(losses))
        return time.perf_counter() - begin

    for visual in inputs:
        seconds(visual)
    return [(seconds(inputs[0]), seconds(inputs[1])) for _ in range(repeats)]


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="pairs of steps")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    asked = parser.parse_args()
    with RankPool(1) as pool:
        pairs = pool.run(compare, asked.repeats, asked.hidden)[0]
    overhead = statistics.median(with_stacks / without - 1 for with_stacks, without in pairs)
    medians = [statistics.median(pair[k] for pair in pairs) for k in range(2)]
    print("with stacks {:.4f} s, without {:.4f} s".format(*medians))
    print(json.dumps({"overhead": round(overhead, 5)}))


if __name__ == "__main__":
    main()
