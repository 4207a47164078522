"""A tiny run with a checkpoint: five questions, of which some have one picture, two, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RopeScalingConfig,
)
from megatron_deepstack.inference.answerer import Answerer
from megatron_deepstack.inference.ask.preparation import Preparation, Prepared
from megatron_deepstack.inference.ask.text import StopWords
from megatron_deepstack.inference.sampling import GREEDY
from megatron_deepstack.testing.ranks import groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

NEW_TOKENS = 64
ANSWERS = ("A photo.", "A number.", "A photo.", "Three photos.", "No photo.")


def train_two_steps(rank: int, recipe: Recipe) -> None:
    """In the recipe's layout, if nothing is there yet."""
    from megatron_deepstack.training.loop import run

    if not (Path(recipe.run_dir) / "checkpoints").exists():
        run(recipe, groups_for(recipe.parallel))


def preprocessed_run(
    folder: Path, model: ModelConfig, parallel: ParallelConfig, tokenizer: Path, **data: object
) -> Recipe:
    """The recipe of a run whose store is there, and whose checkpoint `train_two_steps` makes.

    Args:
        folder: Where its records, pictures and store are written, and where the run will be.
        model: The model.
        parallel: The layout.
        tokenizer: The tokenizer's file or folder.
        **data: Further fields of the section `data`.
    """
    names = write_photos(folder / "images", 4)
    images = (names[:1], names[1:3], names[3:], [], [])
    records = [record(n, images[n], answer=answer) for n, answer in enumerate(ANSWERS)]
    section = DataConfig(
        records=(str(write_records(folder / "records.json", records)),),
        images=str(folder / "images"),
        tokenizer=str(tokenizer),
        store=str(folder / "store.zarr"),
        **data,  # type: ignore[arg-type]
    )
    run = tiny_recipe(model, parallel)
    run = replace(run, data=section, train=replace(run.train, steps=2, init_std=0.3), run_dir=str(folder / "run"))
    preprocess(run, str(section.store), workers=0)
    return run


def make_run(folder: Path, parallel: ParallelConfig | None = None, **changes: object) -> Recipe:
    """A `preprocessed_run` of the tiny model, with scaled rotary positions.

    Args:
        folder: Where all of it lies.
        parallel: Two stages if None.
        **changes: Fields of the model that are otherwise.
    """
    scaling = RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=4.0, original_max_position_embeddings=16)
    language = LanguageConfig(
        vocab_size=512,
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        rope_scaling=scaling,  # of an original length that questions exceed
    )
    tokenizer = write_tokenizer(folder / "tokenizer.model")
    return preprocessed_run(
        folder, tiny_model(language=language, **changes), parallel or ParallelConfig(pipeline=2), tokenizer
    )


def answer_here(rank: int, answerer: Answerer, preparation: Preparation, prepared: list[Prepared]) -> list[list[int]]:
    """Answer questions together: greedy, `NEW_TOKENS` for each that has room for them, and not ended by any token.

    Args:
        rank: Of the pool.
        answerer: Who is asked.
        preparation: How the questions were prepared.
        prepared: The questions.

    Returns:
        The ids of each answer.
    """
    from megatron_deepstack.inference.ask.rank import Batch, answer_batch

    engine, _ = answerer.engine(groups_for(answerer.recipe.parallel))
    batch = Batch(
        questions=tuple(prepared),
        first_number=0,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(-1,),
        stop_words=StopWords((), preparation.tokenizer),
        sampling=GREEDY,
    )
    return answer_batch(engine, preparation, batch)
