"""Spread against inline: step times at PP=2 on two CPU cores, the gain, and the largest gain possible.

Alternates both placements in one run, in the proportions of a 7B decoder (the ViT's forward about 20 % of the
decoder's) and of a 2B one (about 60 %), with the ViT frozen and trained. Two ceilings are printed: what the FLOP count
allows, and what the parts' own durations allow when both cores are busy, which is less, since busy cores slow each
other down.
The last line is one JSON object. Run on an otherwise idle machine: python tools/bench_placement.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_deepstack.config.choices import EncoderPlacement, Part
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, StackConfig, VisionConfig
from megatron_deepstack.planning.budget.cost import decoder_flops, projector_flops, view_flops
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import TinySample, tiny_recipe, unit_pixels

VIEWS, TEXT = 5, 192
LANGUAGE = LanguageConfig(vocab_size=512, hidden_size=256, ffn_hidden_size=704, num_layers=8, num_heads=8)
VISION = VisionConfig(
    image_size=112, patch_size=14, hidden_size=256, ffn_hidden_size=1024, num_layers=4, num_heads=8, select_layer=-1
)
SIZES = {"7B": replace(VISION, hidden_size=192, ffn_hidden_size=768, num_layers=2), "2B": VISION}
TRAINED = {"frozen": (Part.PROJECTOR, Part.LANGUAGE), "trained": tuple(Part)}
SPREAD = ParallelConfig(pipeline=2)
INLINE = replace(SPREAD, encoder_placement=EncoderPlacement.INLINE)


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds (or operations) per micro-batch: decoder stages forward and backward, encoder forward and backward."""

    forward: tuple[float, float]
    backward: tuple[float, float]
    encode: float
    encode_back: float
    micro_batches: int
    """How many a step has."""

    def step(self, placement: EncoderPlacement) -> float:
        """A whole step by Megatron's 1F1B order on two stages, communication free."""
        if placement is EncoderPlacement.INLINE:
            first = (self.forward[0] + self.encode, self.backward[0] + self.encode_back)
            return one_forward_one_backward(first, (self.forward[1], self.backward[1]), self.micro_batches)
        shared = (self.encode + self.encode_back) * self.micro_batches / 2
        stages = ((self.forward[0], self.backward[0]), (self.forward[1], self.backward[1]))
        return shared + one_forward_one_backward(*stages, self.micro_batches)

    @property
    def allowed(self) -> float:
        """inline / spread."""
        return self.step(EncoderPlacement.INLINE) / self.step(EncoderPlacement.SPREAD)


def one_forward_one_backward(first: tuple[float, float], last: tuple[float, float], micro_batches: int) -> float:
    """When a step ends on two stages. Stage 0 runs F0 F1 B0 F2 B1 ..., stage 1 alternates F and B.

    Args:
        first: Seconds of one micro-batch's forward and backward on stage 0.
        last: The same on stage 1.
        micro_batches: How many a step has.

    Returns:
        Seconds from the start of the step.
    """
    sent, returned, clock0, clock1 = [], [], 0.0, 0.0
    for micro_batch in range(micro_batches + 1):
        if micro_batch < micro_batches:
            clock0 += first[0]
            sent.append(clock0)
        if micro_batch >= 1:
            clock1 = max(clock1, sent[micro_batch - 1]) + last[0] + last[1]
            returned.append(clock1)
            clock0 = max(clock0, returned[-1]) + first[1]
    return clock0


def model_of(vision: VisionConfig) -> ModelConfig:
    """The benchmark's decoder with a tower, and four stacks before its first layers."""
    return ModelConfig(vision=vision, language=LANGUAGE, stacks=StackConfig(slots=(0, 1, 2, 3)))


def samples_of(model: ModelConfig, micro_batches: int) -> list[TinySample]:
    """One sample for each micro-batch: an image of five views and `TEXT` tokens."""
    import numpy as np

    from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID

    rng = np.random.default_rng(0)
    size = model.vision.image_size
    samples = []
    for _ in range(micro_batches):
        tokens = rng.integers(1, model.language.vocab_size, TEXT)
        tokens[1] = IMAGE_TOKEN_ID
        pixels = rng.integers(0, 256, (VIEWS, size, size, 3), dtype=np.uint8)
        samples.append(TinySample(tokens, (tokens != IMAGE_TOKEN_ID).astype(np.int64), ((2, 2),), (pixels,)))
    return samples


def flop_durations(model: ModelConfig, trainable: tuple[Part, ...], micro_batches: int) -> Durations:
    """Durations in floating-point operations instead of seconds.

    Args:
        model: The model.
        trainable: The parts that learn, which decide what the encoder's backward costs.
        micro_batches: How many a step has.
    """
    length = TEXT - 1 + (model.vision.image_size // model.vision.patch_size) ** 2
    half = decoder_flops(model.language, length) / 2
    vit, projector = VIEWS * view_flops(model.vision), VIEWS * projector_flops(model)
    backward = 2 * projector + (2 * vit if Part.VISION in trainable else 0.0)
    return Durations((half, half), (2 * half, 2 * half), vit + projector, backward, micro_batches)


class Bench:
    """A rank's engines of one case, one for each placement."""

    def __init__(self, rank: int, model: ModelConfig, trainable: tuple[Part, ...], micro_batches: int) -> None:
        """Build both engines and bind this process to one core. Collective over both ranks.

        Args:
            rank: Number of this rank, which picks the core.
            model: The model.
            trainable: The parts that learn.
            micro_batches: How many a step has.
        """
        from megatron_deepstack.model.build import build_model, fill_model, freeze
        from megatron_deepstack.model.init import random_source
        from megatron_deepstack.planning.batch.step_plan import plan_step
        from megatron_deepstack.step.engine import build_engine

        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(os.getppid()))[rank]})
        self.engines, self.plans, self.pixels = {}, {}, {}
        samples = [[s] for s in samples_of(model, micro_batches)]
        for parallel in (SPREAD, INLINE):
            groups = groups_for(parallel)
            rank_model = build_model(model, parallel, tiny_recipe().train.precision, groups)
            fill_model(rank_model, random_source(model, 0), groups.decoder.tp)
            freeze(rank_model, trainable)
            key = parallel.encoder_placement
            self.engines[key] = build_engine(rank_model, model, parallel, groups)
            planned = [[s.planned(model, 4096) for s in row] for row in samples]
            self.plans[key] = plan_step(model, parallel, planned, groups.replica_rank)
            self.pixels[key] = unit_pixels(model, [[s.pixels for s in row] for row in samples], self.plans[key])

    def step(self, placement: EncoderPlacement) -> float:
        """Seconds of a step up to reduced gradients, from barrier to barrier."""
        import torch.distributed as dist

        from megatron_deepstack.step.clock import StepClock
        from megatron_deepstack.step.train_step import forward_backward

        dist.barrier()
        begin = time.perf_counter()
        forward_backward(self.engines[placement], self.plans[placement], self.pixels[placement], StepClock())
        dist.barrier()
        return time.perf_counter() - begin

    def parts(self) -> tuple[float, float, float, float]:
        """Time the parts of a micro-batch on this rank, while the other rank does the same. Collective over both ranks.

        Returns:
            Seconds of the stage's forward, its backward, the encoder's forward, its backward.
        """
        import torch.distributed as dist

        from megatron_deepstack.model.language import HeadTargets
        from megatron_deepstack.model.vision.views import Views
        from megatron_deepstack.step.encode import EncoderPass

        engine, plan = self.engines[EncoderPlacement.SPREAD], self.plans[EncoderPlacement.SPREAD]
        (chunk,), tokens = engine.model.chunks, torch.from_numpy(plan.tokens[0])
        hidden = torch.randn(plan.seq_lengths[0], 1, LANGUAGE.hidden_size, requires_grad=True)
        pixels = torch.randint(0, 256, (VIEWS, VISION.image_size, VISION.image_size, 3), dtype=torch.uint8)
        chunk.set_input_tensor(hidden)
        dist.barrier()
        clock = [time.perf_counter()]
        output = chunk(tokens, HeadTargets.everywhere(tokens))
        clock.append(time.perf_counter())
        torch.autograd.backward(output, torch.ones_like(output))
        clock.append(time.perf_counter())
        encoded = EncoderPass(engine.model.encoder, Views(pixels))
        clock.append(time.perf_counter())
        encoded.backward(torch.ones_like(encoded.rows))
        clock.append(time.perf_counter())
        return tuple(b - a for a, b in pairwise(clock))  # type: ignore[return-value]


_bench: dict[str, Bench] = {}


def prepare(rank: int, model: ModelConfig, trainable: tuple[Part, ...], micro_batches: int) -> list[int]:
    """Build a case. Collective over both ranks.

    Args:
        rank: Number of this rank.
        model: The model.
        trainable: The parts that learn.
        micro_batches: How many a step has.

    Returns:
        The number of rows that this rank sends to each other rank.
    """
    _bench["case"] = Bench(rank, model, trainable, micro_batches)
    splits = list(_bench["case"].plans[EncoderPlacement.SPREAD].routes.send_splits)
    return [count for other, count in enumerate(splits) if other != rank]


def measure(rank: int, placement: EncoderPlacement) -> float:
    """Seconds of one step of the case that was prepared. Collective over both ranks."""
    return _bench["case"].step(placement)


def measure_parts(rank: int) -> tuple[float, float, float, float]:
    """Seconds of the parts of a micro-batch, as `Bench.parts` gives them. Collective over both ranks."""
    return _bench["case"].parts()


def busy_durations(pool: RankPool, repeats: int, micro_batches: int) -> Durations:
    """Median durations of the parts while both cores are busy.

    Args:
        pool: Two ranks with a case that was prepared.
        repeats: How often each part is measured.
        micro_batches: How many a step has.
    """
    runs = [pool.run(measure_parts) for _ in range(repeats)]
    of = [[statistics.median(run[rank][part] for run in runs) for part in range(4)] for rank in range(2)]
    return Durations(
        forward=(of[0][0], of[1][0]),
        backward=(of[0][1], of[1][1]),
        encode=(of[0][2] + of[1][2]) / 2,
        encode_back=(of[0][3] + of[1][3]) / 2,
        micro_batches=micro_batches,
    )


def run_case(pool: RankPool, size: str, which: str, repeats: int, micro_batches: int) -> dict[str, float]:
    """Measure and print one case, both placements in turns.

    Args:
        pool: Two ranks.
        size: A key of `SIZES`.
        which: A key of `TRAINED`.
        repeats: Steps of each placement.
        micro_batches: How many a step has.

    Returns:
        inline / spread as measured (`gain`), as busy durations allow, and as the FLOPs allow.
    """
    model, trainable = model_of(SIZES[size]), TRAINED[which]
    sent = pool.run(prepare, model, trainable, micro_batches)
    times: dict[EncoderPlacement, list[float]] = {placement: [] for placement in EncoderPlacement}
    for placement in EncoderPlacement:
        pool.run(measure, placement)
    for _ in range(repeats):
        for placement in EncoderPlacement:
            times[placement].append(max(pool.run(measure, placement)))
    pairs = zip(times[EncoderPlacement.INLINE], times[EncoderPlacement.SPREAD], strict=True)
    gain = statistics.median(inline / spread for inline, spread in pairs)
    operations = flop_durations(model, trainable, micro_batches)
    busy = busy_durations(pool, 3 * repeats, micro_batches)
    share = VIEWS * view_flops(model.vision) / (2 * operations.forward[0])
    row_bytes = LANGUAGE.hidden_size * 4
    print(f"{size} proportions (ViT {share:.0%} of the decoder's forward), ViT {which}")
    for placement in EncoderPlacement:
        print(f"  {placement.value:7} {statistics.median(times[placement]):.3f} s a step")
    print(f"  inline / spread {gain:.3f}; FLOPs allow {operations.allowed:.3f}, busy durations {busy.allowed:.3f}")
    print(
        f"  rows to the other rank: {[counts[0] for counts in sent]} = {[c[0] * row_bytes for c in sent]} bytes",
        flush=True,
    )
    return {"gain": gain, "allowed": busy.allowed, "flops": operations.allowed}


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each placement per case")
    parser.add_argument("--micro-batches", type=int, default=16, help="micro-batches of a step")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with RankPool(2) as pool:
        for size in SIZES:
            for which in TRAINED:
                found = run_case(pool, size, which, asked.repeats, asked.micro_batches)
                if size == "2B":
                    results |= {f"gain_{which}": found["gain"], f"allowed_{which}": found["allowed"]}
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


if __name__ == "__main__":
    main()
