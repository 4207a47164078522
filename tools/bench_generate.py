"""How fast answers are written: with the key/value cache, against recomputing and against transformers' `generate`.

One process, greedy, text prompts, random weights: `tiny` is the demo's decoder, `middle` has 8 layers of width 1024 and
32000 words. transformers runs a LlamaForCausalLM of the same sizes with its own cache. The ways alternate in one
process, and medians are compared. `growth` is the time of twice as many new tokens over the time of once, prompts left
out: 2 is linear. The last line is one JSON object. Run on an otherwise idle machine: python tools/bench_generate.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model

SIZES = {
    "tiny": LanguageConfig(vocab_size=480, hidden_size=128, ffn_hidden_size=256, num_layers=4, num_heads=4),
    "middle": LanguageConfig(vocab_size=32000, hidden_size=1024, ffn_hidden_size=2816, num_layers=8, num_heads=16),
}


@dataclass(frozen=True)
class Task:
    """What is measured."""

    language: LanguageConfig
    batch: int
    prompt: int
    new: int
    repeats: int
    recompute: bool


@dataclass(frozen=True)
class NoPictures:
    """Views for questions without pictures."""

    crop_size: int

    def image(self, index: int) -> object:
        """Never asked for."""
        raise IndexError(index)

    def read_views(self, image: int, views: Sequence[int]) -> np.ndarray:
        """Never asked for."""
        raise IndexError(image)


def measure(rank: int, task: Task) -> dict[str, list[float]]:
    """Time all ways in turns.

    Args:
        rank: Number of this rank; there is one.
        task: What is measured.

    Returns:
        By way the seconds of each repeat.
    """
    model = tiny_model(language=task.language, stacks=StackConfig(slots=(0, 1, 2, 3)))
    ours = our_way(model, task)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: ours("cached", task.new),
        "ours_half": lambda: ours("cached", task.new // 2),
        "ours_first": lambda: ours("cached", 1),
        "transformers": their_way(model, task),
    }
    if task.recompute:
        ways["recomputed"] = lambda: ours("recomputed", task.new)
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(task.repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - begin)
    return found


def our_way(model: ModelConfig, task: Task) -> Callable[[str, int], object]:
    """A function that writes so many tokens by one of our two ways."""
    from megatron_deepstack.inference.generate import Method, Writing, generate_answers
    from megatron_deepstack.inference.loading import make_ready
    from megatron_deepstack.inference.questions import Question
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source
    from megatron_deepstack.step.engine import Engine

    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, random_source(model, 0), groups.decoder.tp)
    make_ready(built)
    engine = Engine(built, model, [], None, groups, ParallelConfig())
    chance = np.random.default_rng(0)
    questions = [
        Question(n, str(n), "", "", chance.integers(3, task.language.vocab_size, task.prompt).astype(np.int32), ())
        for n in range(task.batch)
    ]
    views = NoPictures(model.vision.image_size)

    def write(method: str, new: int) -> object:
        writing = Writing(max_new_tokens=new, stop_ids=(-1,), method=Method(method))
        (answers,) = generate_answers(engine, views, [questions], writing)  # type: ignore[arg-type]
        assert [len(ids) for ids in answers] == [new] * task.batch
        return answers

    return write


def their_way(model: ModelConfig, task: Task) -> Callable[[], object]:
    """transformers' `generate` for a Llama of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language = model.language
    config = LlamaConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        max_position_embeddings=task.prompt + task.new + 8,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, language.vocab_size, (task.batch, task.prompt))
    options = {"max_new_tokens": task.new, "min_new_tokens": task.new, "do_sample": False, "pad_token_id": 0}

    def write() -> object:
        with torch.no_grad():
            written = llama.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert written.shape[1] == task.prompt + task.new
        return written

    return write


def main() -> None:
    """Measure, print, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="decoders")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="sequences at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens, an even number")
    parser.add_argument("--repeats", type=int, default=5, help="times each way is measured")
    asked = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with RankPool(1, deadline_seconds=3600) as pool:
        for size in asked.sizes:
            for batch in asked.batches:
                task = Task(SIZES[size], batch, asked.prompt, asked.new, asked.repeats, recompute=batch == 1)
                seconds = {way: statistics.median(times) for way, times in pool.run(measure, task)[0].items()}
                rate = {way: batch * asked.new / seconds[way] for way in seconds if not way.startswith("ours_")}
                prompt = seconds["ours_first"]
                growth = (seconds["ours"] - prompt) / (seconds["ours_half"] - prompt)
                results[f"{size}, batch {batch}"] = {
                    **{f"{way}_tokens_per_second": round(value, 1) for way, value in rate.items()},
                    "over_transformers": round(rate["ours"] / rate["transformers"], 3),
                    "growth": round(growth, 2),
                }
                shown = ", ".join(f"{way} {value:,.0f}" for way, value in rate.items())
                print(f"{size}, batch {batch}: tokens/s {shown}; growth {growth:.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
