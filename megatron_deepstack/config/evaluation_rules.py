"""What the section `evaluation` requires of the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import Recipe


def violations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what stands against the evaluations that a recipe asks for during training.

    Args:
        recipe: The recipe.

    Yields:
        The paths of the fields that do not fit, and what is wrong in words.
    """
    asked, data = recipe.evaluation, recipe.data
    if asked.store is not None and asked.file is not None:
        yield "evaluation.file evaluation.store", "both are set, and questions come from one of them; set one to null"
    if asked.images is not None and asked.file is None:
        yield (
            "evaluation.images evaluation.file",
            "is set without evaluation.file, whose pictures it holds",
        )
    if not asked.interval:
        return
    every = f"asks questions every {asked.interval} steps"
    if asked.store is None and asked.file is None and data.validation_store is None:
        yield (
            "evaluation.interval evaluation.store data.validation_store",
            f"{every}, and no questions are named; set evaluation.store, evaluation.file or data.validation_store",
        )
    if data.tokenizer is None:
        yield "evaluation.interval data.tokenizer", f"{every}, and data.tokenizer, which writes answers, is not set"
    if recipe.train.precision is Precision.FP8:
        yield (
            "evaluation.interval train.precision",
            f"{every}, one token at a time, which 8-bit layers do not take; use train.precision=bf16, or "
            "train.validation_interval during training and `evaluate` on its checkpoints",
        )
