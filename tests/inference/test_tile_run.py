"""A whole run of a model with padded tiles: preprocessed, trained in two stages, answered, exported, answered again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import preprocessed_run, train_two_steps

from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.inference.main import open_questions
from megatron_deepstack.inference.questions import read_question
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite
from megatron_deepstack.testing.tiny_chat import GRANITE_4_CONFIG, GRANITE_4_TOKENS, write_chat_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_transformers")

NEW_TOKENS = 8


def make_tile_run(folder: Path) -> Recipe:
    tokenizer = write_chat_tokenizer(folder / "tokenizer", GRANITE_4_TOKENS, GRANITE_4_CONFIG)
    model = tiny_granite()
    model = replace(model, language=replace(model.language, vocab_size=512))
    return preprocessed_run(folder, model, ParallelConfig(pipeline=2), tokenizer, template=Template.GRANITE_4)


def train_and_answer(rank: int, recipe: Recipe) -> list[list[int]]:
    from megatron_deepstack.inference.generate import Writing, generate_answers
    from megatron_deepstack.inference.loading import load_engine

    train_two_steps(rank, recipe)
    assert recipe.data.store is not None
    store, tokenizer = open_questions(recipe, recipe.data.store)
    engine = load_engine(recipe, groups_for(recipe.parallel))
    questions = [[read_question(store, index, tokenizer) for index in range(3)]]
    writing = Writing(max_new_tokens=NEW_TOKENS, stop_ids=(511,))
    return [ids for batch in generate_answers(engine, store, questions, writing) for ids in batch]


def export_one(rank: int, recipe: Recipe, output: str) -> None:
    from megatron_deepstack.inference.export import export_on_rank

    export_on_rank(
        replace(recipe, parallel=ParallelConfig()), output, Naming.HUGGING_FACE, groups_for(ParallelConfig())
    )


@pytest.mark.slow
def test_transformers_answers_from_the_export_as_the_run_does(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    recipe = make_tile_run(tmp_path)
    answers = ranks(2).run(train_and_answer, recipe)[0]
    ranks(1).run(export_one, recipe, str(tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    photos = sorted((tmp_path / "images").iterdir())
    for number, pictures in enumerate((photos[:1], photos[1:3], photos[3:])):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        images = [Image.open(picture).convert("RGB") for picture in pictures]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=511)
        ours = answers[number]
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(ours)] == ours
