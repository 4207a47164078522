"""Speed on one CPU core as ratios of process CPU times within one run, and ratios that the planner simulates.

- `transformers / ours`: a step of `LlavaForConditionalGeneration` with fused AdamW, against a step here (variant llava,
  the same shapes and batch, one process and thread). Above 1 this package is faster.
- `in sequence / deepstack`, `deepstack / llava`: steps of the variants with the proportions of a 7B model: widths,
  heads, depth, vocabulary, tower and text are an eighth of the 7B recipe's, tokens of a view a ninth, and there are
  all four stacks, one a layer. Depth to width, and attention to products, are then as in the recipe.
- `padded / packed`: steps over samples with lengths like LLaVA's 665K mix, scaled down.
- `inline / spread`, `1F1B / VPP 2`: predicted step times of a 7B model on H100s with four stages. Interleaving needs
  micro-batches of one length, which costs padding.
- `bytes, ours / transformers`: bytes that operators write in such a step outside matrix products, and in all. They do
  not depend on how busy the machine is. `--bytes` takes these and the simulated ratios alone.
- `share of a step waiting for data`: of a run of this package from a store on disk, by the clock of its loop.

Each ratio is of medians of alternating rounds. The last line is one JSON object with all ratios.
Run on an otherwise idle machine: OMP_NUM_THREADS=1 python tools/bench_speed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_deepstack.config.choices import Batching, EncoderPlacement, Part, Precision, Variant
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.drawn import drawn_shapes
from megatron_deepstack.planning.budget.hardware import MACHINES
from megatron_deepstack.planning.budget.run_plan import plan_run
from megatron_deepstack.planning.views import num_views
from megatron_deepstack.testing.tiny import TinySample

VISION = VisionConfig(image_size=56, patch_size=14, hidden_size=256, ffn_hidden_size=1024, num_layers=4, num_heads=4)
SHAPES = ((8, 70, 512), (8, 70, 32000), (2, 512, 512), (2, 512, 32000))
"""Samples, tokens of each, vocabulary."""
VIEW_TOKENS = 16
EIGHTH_VISION = VisionConfig(
    image_size=112, patch_size=14, hidden_size=128, ffn_hidden_size=512, num_layers=3, num_heads=2
)
EIGHTH = LanguageConfig(vocab_size=4000, hidden_size=512, ffn_hidden_size=1376, num_layers=4, num_heads=4)
EIGHTH_LENGTH = 64 + 32
"""Tokens of a view, and of text: a ninth of 576 and an eighth of 260, the mean of LLaVA's 665K mix."""
Step = Callable[[], float]


WIDTH = 512
"""Width of the decoders that are measured."""


def recipe_of(
    batch: int, vocabulary: int, variant: Variant, batching: Batching = Batching.PADDED, width: int = WIDTH
) -> Recipe:
    """A recipe of about 31M parameters at its own width, all of which learn."""
    language = LanguageConfig(
        vocab_size=vocabulary, hidden_size=width, ffn_hidden_size=width * 43 // 16, num_layers=8, num_heads=8
    )
    return Recipe(
        model=ModelConfig(variant=variant, vision=VISION, language=language, stacks=StackConfig()),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(
            global_batch_size=batch,
            micro_batch_size=1 if batching is Batching.PACKED else batch,
            seq_length=1024,
            batching=batching,
            precision=Precision.FP32,
            trainable=tuple(Part),
        ),
    )


def eighth_of_7b(batch: int, variant: Variant, width: int) -> Recipe:
    """A recipe with the proportions of the 7B one, an eighth as large in each direction."""
    recipe, language = recipe_of(batch, 512, variant), EIGHTH
    if width != WIDTH:
        language = replace(EIGHTH, hidden_size=width, ffn_hidden_size=width * 43 // 16)
    stacks = StackConfig(slots=(0, 1, 2, 3)) if variant is Variant.DEEPSTACK_L else StackConfig()
    return replace(recipe, model=replace(recipe.model, vision=EIGHTH_VISION, language=language, stacks=stacks))


def samples_of(recipe: Recipe, lengths: list[int]) -> list[TinySample]:
    """Samples of one image each, with so many tokens when the image takes the tokens of one view."""
    random, model = np.random.default_rng(0), recipe.model
    side, view_tokens = model.vision.image_size, tokens_per_view(model.vision)
    found = []
    for length in lengths:
        tokens = random.integers(5, 500, max(length - view_tokens + 1, 2))
        tokens[1] = IMAGE_TOKEN_ID
        views = num_views(model.variant, (2, 2))
        pixels = random.integers(0, 255, (views, side, side, 3), dtype=np.uint8)
        found.append(TinySample(tokens, np.ones_like(tokens), ((2, 2),), (pixels,)))
    return found


def ours(recipe: Recipe, lengths: list[int]) -> Step:
    """A step of this package in this process, forward to update."""
    from megatron_deepstack.model.build import build_model, fill_model, freeze
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.step.clock import StepClock
    from megatron_deepstack.step.engine import build_engine
    from megatron_deepstack.step.train_step import gradient_sums
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.testing.tiny import tiny_share, unit_pixels
    from megatron_deepstack.training.optim.optimizer import Optimizer

    groups, train = groups_for(recipe.parallel), recipe.train
    model = build_model(recipe.model, recipe.parallel, train.precision, groups)
    fill_model(model, random_source(recipe.model, 1), groups.decoder.tp)
    freeze(model, train.trainable)
    engine = build_engine(model, recipe.model, recipe.parallel, groups)
    optimizer = Optimizer(engine, recipe.optimizer, train.precision, 1000)
    planned, images = tiny_share(samples_of(recipe, lengths), recipe, 0, 1)
    packed = train.batching is Batching.PACKED
    plan = plan_step(recipe.model, recipe.parallel, planned, 0, packed=packed)
    pixels = unit_pixels(recipe.model, images, plan)

    def step() -> float:
        begin = time.process_time()
        loss = gradient_sums(engine, plan, pixels, StepClock())
        optimizer.step(0, scale=loss.gradient_scale)
        return time.process_time() - begin

    return step


def theirs(recipe: Recipe, lengths: list[int]) -> Step:
    """A step of transformers' LLaVA with the same shapes."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    language, vision = recipe.model.language, recipe.model.vision
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.ffn_hidden_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            ),
            text_config=LlamaConfig(
                vocab_size=language.vocab_size,
                hidden_size=language.hidden_size,
                intermediate_size=language.ffn_hidden_size,
                num_hidden_layers=language.num_layers,
                num_attention_heads=language.num_heads,
            ),
            image_token_index=3,
            image_token_id=3,
            vision_feature_layer=-2,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, length = len(lengths), lengths[0]
    tokens = torch.randint(5, 500, (batch, length))
    tokens[:, 1 : 1 + VIEW_TOKENS] = 3
    labels = tokens.clone()
    labels[:, 1 : 1 + VIEW_TOKENS] = -100
    pixels = torch.rand(batch, 3, vision.image_size, vision.image_size)

    def step() -> float:
        begin = time.process_time()
        loss = model(input_ids=tokens, pixel_values=pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - begin

    return step


def ratio(first: Step, second: Step, rounds: int) -> float:
    """How many times as long the first takes as the second; rounds alternate."""
    for step in (first, second):
        step()
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(one for one, _ in pairs) / statistics.median(other for _, other in pairs)


def written(step: Step) -> tuple[float, float]:
    """Bytes that a step writes outside matrix products, and in all; a first step is not counted."""
    from megatron_deepstack.testing.written_bytes import WrittenBytes

    step()
    with WrittenBytes() as watched:
        step()
    largest = ", ".join(f"{name} {count / 1e6:.0f}" for name, count in watched.others.most_common(6))
    print(
        f"      {watched.other_bytes / 1e6:.0f} MB in {watched.calls} operators, products {watched.products / 1e6:.0f}"
    )
    print(f"      most by {largest}", flush=True)
    return watched.other_bytes, watched.other_bytes + watched.products


def byte_ratios(cases: int) -> dict[str, float]:
    """How many bytes ours writes for one of transformers, for the first and the last of so many shapes."""
    found = {}
    for batch, length, vocabulary in sorted({SHAPES[0], SHAPES[-1]})[-cases:] if cases else ():
        recipe = recipe_of(batch, vocabulary, Variant.LLAVA)
        name = f"bytes, ours / transformers, {batch} x {length}, vocabulary {vocabulary}"
        (outside, whole), (their_outside, their_whole) = (
            written(make(recipe, [length] * batch)) for make in (ours, theirs)
        )
        found[f"{name}, without products"] = outside / their_outside
        found[name] = whole / their_whole
    return found


def data_wait(folder: Path, steps: int, width: int) -> float:
    """Share of its steps' time that a run waits for data, the first two left out: photos, preprocessed to a store."""
    from megatron_deepstack.testing.ranks import groups_for
    from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
    from megatron_deepstack.training.loop import run
    from orchestration.preprocess.driver.run import preprocess

    names = write_photos(folder / "images", 32)
    records = write_records(folder / "records.json", [record(n, [name]) for n, name in enumerate(names)])
    recipe = recipe_of(8, 512, Variant.DEEPSTACK_L, width=width)
    recipe = replace(
        recipe,
        run_dir=str(folder / "run"),
        data=DataConfig(
            records=(str(records),),
            images=str(folder / "images"),
            tokenizer=str(write_tokenizer(folder / "tokenizer.model")),
            store=str(folder / "store.zarr"),
        ),
        train=replace(recipe.train, steps=steps),
    )
    preprocess(recipe, str(recipe.data.store), workers=0)
    run(recipe, groups_for(recipe.parallel))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    taken = [json.loads(line) for line in lines][2:]
    return float(sum(one["seconds"]["data"] for one in taken) / sum(one["step_seconds"] for one in taken))


def simulated() -> dict[str, float]:
    """Ratios of predicted step times of DeepStack-L 7B on 4 H100s."""
    recipe = load_recipe("deepstack_l_7b_finetune")
    shapes, machine = drawn_shapes(recipe), MACHINES["h100"]
    parallel = ParallelConfig(pipeline=4, distributed_optimizer=True)

    def seconds(changed: ParallelConfig) -> float:
        return plan_run(replace(recipe, parallel=changed), shapes, machine, 4).seconds.total

    plain = seconds(parallel)
    return {
        "inline / spread, PP 4, simulated": seconds(replace(parallel, encoder_placement=EncoderPlacement.INLINE))
        / plain,
        "1F1B / VPP 2, PP 4, simulated": plain / seconds(replace(parallel, virtual_pipeline=2)),
    }


def measure(folder: str, rounds: int, cases: int, width: int) -> dict[str, float]:
    """All measured ratios, in this process as the only rank."""
    found = byte_ratios(cases)
    for batch, length, vocabulary in SHAPES[:cases]:
        recipe = recipe_of(batch, vocabulary, Variant.LLAVA)
        name = f"transformers / ours, {batch} x {length}, vocabulary {vocabulary}"
        found[name] = ratio(theirs(recipe, [length] * batch), ours(recipe, [length] * batch), rounds)
        print(f"{found[name]:5.2f}  {name}", flush=True)
    lengths = [EIGHTH_LENGTH] * 4
    variants = {one: eighth_of_7b(4, one, width) for one in (Variant.DEEPSTACK_L, Variant.IN_SEQUENCE, Variant.LLAVA)}
    steps = {one: ours(recipe, lengths) for one, recipe in variants.items()}
    found["in sequence / deepstack"] = ratio(steps[Variant.IN_SEQUENCE], steps[Variant.DEEPSTACK_L], rounds)
    found["deepstack / llava"] = ratio(steps[Variant.DEEPSTACK_L], steps[Variant.LLAVA], rounds)
    mix = (np.clip(np.exp(np.random.default_rng(1).normal(4.2, 0.9, 16)), 20, 900)).astype(int).tolist()
    padded = recipe_of(16, 512, Variant.LLAVA, width=width)
    padded = replace(padded, train=replace(padded.train, micro_batch_size=4))
    packed = recipe_of(16, 512, Variant.LLAVA, Batching.PACKED, width)
    found["padded / packed"] = ratio(ours(padded, mix), ours(packed, mix), rounds)
    found["share of a step waiting for data"] = data_wait(Path(folder), rounds + 5, width)
    return found


def main() -> None:
    """Measure, print, and end with one JSON object."""
    import tempfile

    from megatron_deepstack.testing.ranks import be_the_only_rank

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds of each pair")
    parser.add_argument("--cases", type=int, default=len(SHAPES), help="shapes compared with transformers")
    parser.add_argument("--bytes", action="store_true", help="simulated ratios and bytes written alone, no times")
    parser.add_argument("--width", type=int, default=WIDTH, help="width of the decoders that are ours on both sides")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        be_the_only_rank(Path(folder))
        found = simulated()
        found |= byte_ratios(asked.cases) if asked.bytes else measure(folder, asked.rounds, asked.cases, asked.width)
    for name, value in found.items():
        print(f"{value:5.2f}  {name}")
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
