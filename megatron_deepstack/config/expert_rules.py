"""Rules for decoders whose layers have experts: the model, its layout over ranks, and what does not go with it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_deepstack.config.choices import LoraTarget, Precision
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers, nearest_divisor
from megatron_deepstack.config.traits.families import find_family
from megatron_deepstack.errors import ConfigError, LayoutError


def expert_problems(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with the experts of a model, or with experts in a model that has none.

    Args:
        model: The recipe's model.

    Yields:
        A problem for each mistake.
    """
    language, variant = model.language, model.variant
    family = find_family(language.family or "")
    has_experts = family is not None and family.has_experts
    if has_experts is not variant.traits.has_experts and (has_experts or variant.traits.whole_model):
        yield _problem(
            "model.variant model.language.family",
            f"the decoder of {variant} is one {'with' if variant.traits.has_experts else 'without'} experts, and the "
            f"family {language.family} one {'with' if has_experts else 'without'} them; set both to qwen3_vl_moe, or "
            "neither",
        )
        return
    if not has_experts:
        if language.num_experts:
            yield _problem(
                "model.language.num_experts model.language.family",
                f"found {language.num_experts}, and a decoder of the family {language.family or 'llama'} has none; set "
                "0, or a family with experts such as qwen3_vl_moe",
            )
        return
    if language.num_active_experts > language.num_experts > 0:
        yield _problem(
            "model.language.num_active_experts model.language.num_experts",
            f"{language.num_active_experts} experts for each token, of {language.num_experts}; use at most as many",
        )
    outside = [layer for layer in language.dense_layers if layer >= language.num_layers]
    if outside:
        yield _problem(
            "model.language.dense_layers model.language.num_layers",
            f"found {list(language.dense_layers)}, expected layers from 0 to {language.num_layers - 1}",
        )


def expert_layout_problems(language: LanguageConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Yield why the experts of a decoder do not fit a layout.

    Args:
        language: The decoder.
        parallel: The layout.

    Yields:
        A problem for each mistake. Whether the number of ranks fits is a question of `planning.check`.
    """
    if not expert_layers(language):
        if parallel.expert > 1:
            yield _problem(
                "parallel.expert model.language.num_experts",
                f"{parallel.expert} ranks share experts, and no layer of the decoder has any; set parallel.expert=1",
                LayoutError,
            )
        return
    if parallel.expert and language.num_experts % parallel.expert:
        yield _problem(
            "parallel.expert model.language.num_experts",
            f"{parallel.expert} ranks do not divide the {language.num_experts} experts; use "
            f"{nearest_divisor(language.num_experts, parallel.expert)}",
            LayoutError,
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield _problem(
            "parallel.sequence_parallel parallel.tensor model.language.num_experts",
            "the ranks of tensor parallelism send different tokens to experts, so each must hold its own part of the "
            "sequence; set parallel.sequence_parallel=true, or parallel.tensor=1",
            LayoutError,
        )


def unsupported_with_experts(recipe: Recipe) -> Iterator[Problem]:
    """Yield settings that a decoder with experts cannot have.

    Args:
        recipe: The recipe.

    Yields:
        A problem for each of them.
    """
    if not expert_layers(recipe.model.language):
        return
    in_mlp = [target for target in recipe.lora.targets if target in (LoraTarget.MLP_IN, LoraTarget.MLP_OUT)]
    if recipe.lora.rank and in_mlp:
        attention = ", ".join(target for target in LoraTarget if target not in (LoraTarget.MLP_IN, LoraTarget.MLP_OUT))
        yield _problem(
            "lora.targets lora.rank model.language.num_experts",
            f"found {', '.join(in_mlp)}, and experts get no adapters; use lora.targets=[{attention}]",
        )
    if recipe.train.precision is Precision.FP8:
        yield _problem(
            "train.precision model.language.num_experts",
            "fp8 is not supported for a decoder with experts, whose numbers of tokens change in each step; use bf16",
        )


def _problem(paths: str, text: str, kind: type[ConfigError] = ConfigError) -> Problem:
    return Problem(paths=tuple(paths.split()), text=text, kind=kind)
