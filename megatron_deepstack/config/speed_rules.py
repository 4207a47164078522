"""What in a recipe stands against the settings of its section `speed`, whatever the machine.

The check of recipes makes an error of it where a setting is demanded; `model.layers.speed` adds what the machine lacks.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_deepstack.config.choices import (
    Batching,
    GradientDtype,
    Layers,
    MomentDtype,
    OptIn,
    Precision,
    Recompute,
    RecomputeModule,
    RowLength,
    Switch,
)
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    SpeedConfig,
)
from megatron_deepstack.config.sizes import expert_layers, recomputed_modules

FUSIONS = (
    "activation_fusion",
    "rope_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_fusion",
    "optimizer_fusion",
)
"""Settings that follow `speed.fusions` where they are `auto`."""
GRAPHS_AND_GATHER = "layers in CUDA graphs do not wait for parameters that are still being gathered"
BF16_ROUNDING = 2.0**-8
"""Largest relative change of a number that rounding to bf16 may take back: half of its last place."""


def switch_of(speed: SpeedConfig, name: str) -> Switch:
    """Return how a setting is switched, `speed.fusions` taken into account.

    Args:
        speed: The section.
        name: Name of a field that is a `Switch`.

    Returns:
        The field's value, or that of `fusions` where a fusion is `auto`.
    """
    switch: Switch = getattr(speed, name)
    return speed.fusions if switch is Switch.AUTO and name in FUSIONS else switch


def obstacles(
    language: LanguageConfig, parallel: ParallelConfig, precision: Precision, lora: LoraConfig
) -> dict[str, tuple[str, str]]:
    """List what a recipe makes impossible.

    Args:
        language: The decoder.
        parallel: The layout.
        precision: Dtype of parameters and activations.
        lora: Adapters of the decoder.

    Returns:
        By setting, the path of the field that stands against it, and why, as a clause.
    """
    found = {}
    if language.mrope_section is not None:
        reason = "the kernel takes one position for a token, and this decoder has three"
        found["rope_fusion"] = "model.language.mrope_section", reason
    if lora.rank:
        found["gradient_accumulation_fusion"] = "lora.rank", "LoRA freezes the decoder's matrices"
    if precision is Precision.FP32:
        found["cross_entropy_fusion"] = "train.precision", "its gradients are bf16, and train.precision is fp32"
    if parallel.virtual_pipeline == 1:
        found["overlap_p2p"] = "parallel.virtual_pipeline", "a stage has one chunk (parallel.virtual_pipeline is 1)"
    if not parallel.distributed_optimizer:
        reason = "parameters are gathered only under parallel.distributed_optimizer"
        found["overlap_param_gather"] = "parallel.distributed_optimizer", reason
    elif not parallel.overlap_grad_reduce:
        reason = "it needs the buckets of parallel.overlap_grad_reduce, which is false"
        found["overlap_param_gather"] = "parallel.overlap_grad_reduce", reason
    return found


def violations(
    speed: SpeedConfig, language: LanguageConfig, parallel: ParallelConfig, precision: Precision, lora: LoraConfig
) -> Iterator[tuple[str, str]]:
    """Yield what a recipe demands and makes impossible.

    Args:
        speed: The section.
        language: The decoder.
        parallel: The layout.
        precision: Dtype of parameters and activations.
        lora: Adapters of the decoder.

    Yields:
        The paths of the fields that do not fit, and what is wrong in words.
    """
    for name, (path, reason) in obstacles(language, parallel, precision, lora).items():
        if switch_of(speed, name) is Switch.ALWAYS:
            yield f"speed.{name} {path}", f"always is impossible here: {reason}; use auto"
    if speed.gradient_dtype is GradientDtype.BF16 and precision is Precision.FP32:
        yield (
            "speed.gradient_dtype train.precision",
            "found bf16 under train.precision fp32, whose parameters need float32 gradients; use fp32",
        )


def shape_violations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what stands against settings that need all micro-batches to have one shape.

    Args:
        recipe: The recipe.

    Yields:
        The paths of the fields that do not fit, and what is wrong in words.
    """
    if recipe.speed.cuda_graphs is OptIn.ALWAYS:
        for path, reason in _against_graphs(recipe):
            yield f"speed.cuda_graphs {path}", f"found always, and {reason}, or set speed.cuda_graphs=never"
    if recipe.speed.tp_overlap is OptIn.ALWAYS:
        for path, reason in _against_overlap(recipe):
            yield f"speed.tp_overlap {path}", f"found always, and {reason}, or set speed.tp_overlap=never"


def _against_graphs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    parallel, train = recipe.parallel, recipe.train
    if train.batching is Batching.PACKED:
        yield "train.batching", "each packed row has its own bounds; use train.batching=padded"
    if train.row_length is not RowLength.FULL:
        yield "train.row_length", "rows of a step are as long as they need to be; use train.row_length=full"
    if expert_layers(recipe.model.language):
        yield "model.language.num_experts", "experts get another number of tokens each time; use a decoder without"
    if parallel.recompute is not Recompute.NONE:
        yield "parallel.recompute", "a graph keeps its activations itself; use parallel.recompute=none"
    if parallel.offload_layers:
        yield "parallel.offload_layers", "a graph keeps its activations itself; use parallel.offload_layers=0"
    if parallel.virtual_pipeline > 1:
        yield "parallel.virtual_pipeline", "graphs are captured for one chunk per stage; use virtual_pipeline=1"
    if parallel.context > 1:
        yield "parallel.context", "ring attention has streams of its own; use parallel.context=1"
    if train.precision is not Precision.BF16:
        yield "train.precision", f"graphs are captured in bf16, not {train.precision}; use train.precision=bf16"
    if recipe.model.layers is Layers.LOCAL:
        yield "model.layers", "Transformer Engine captures them; use model.layers=auto"
    if recipe.speed.overlap_param_gather is Switch.ALWAYS:
        yield "speed.overlap_param_gather", f"{GRAPHS_AND_GATHER}; use speed.overlap_param_gather=auto"


def _against_overlap(recipe: Recipe) -> Iterator[tuple[str, str]]:
    parallel, train = recipe.parallel, recipe.train
    if parallel.tensor == 1:
        yield "parallel.tensor", "there is one tensor-parallel rank; use parallel.tensor=2 or more"
    elif not parallel.sequence_parallel:
        yield "parallel.sequence_parallel", "ranks hold whole sequences; use parallel.sequence_parallel=true"
    if train.row_length is not RowLength.FULL:
        yield "train.row_length", "its buffers are made for one length of rows; use train.row_length=full"
    if expert_layers(recipe.model.language):
        yield "model.language.num_experts", "experts exchange tokens in another way; use a decoder without"
    if recipe.lora.rank:
        yield "lora.rank", "adapters read what the linears have not gathered yet; use lora.rank=0"
    if train.precision is Precision.FP32:
        yield "train.precision", "its buffers are bf16; use train.precision=bf16"
    if recipe.model.layers is Layers.LOCAL:
        yield "model.layers", "it is Transformer Engine's; use model.layers=auto"
    if recipe.evaluation.interval:
        yield "evaluation.interval", "questions have rows of other lengths; use evaluation.interval=0"


def kept_violations(
    language: LanguageConfig, parallel: ParallelConfig, precision: Precision
) -> Iterator[tuple[str, str]]:
    """Yield what stands against computing parts of layers again, or against keeping activations on the host.

    Args:
        language: The decoder.
        parallel: The layout.
        precision: Dtype of parameters and activations.

    Yields:
        The paths of the fields that do not fit, and what is wrong in words.
    """
    again = recomputed_modules(parallel)
    if RecomputeModule.LAYER_NORM in again and precision is Precision.FP8:
        yield (
            "parallel.recompute_modules train.precision",
            f"found {RecomputeModule.LAYER_NORM} under fp8, where linears keep their input in 8 bits and not what a "
            "norm computes, so that nothing would be saved; leave it out, or use bf16",
        )
    if RecomputeModule.EXPERT_ACTIVATION in again and not expert_layers(language):
        yield (
            "parallel.recompute_modules model.language.num_experts",
            f"found {RecomputeModule.EXPERT_ACTIVATION}, and no layer of the decoder has experts; leave it out",
        )
    if parallel.offload_layers and parallel.recompute is Recompute.FULL:
        yield (
            "parallel.offload_layers parallel.recompute",
            f"found {parallel.offload_layers} under recompute=full, which keeps nothing of layers but their input; use "
            "parallel.recompute=none or selective, or set parallel.offload_layers=0",
        )
    if parallel.offload_layers and precision is Precision.FP8:
        yield (
            "parallel.offload_layers train.precision",
            f"found {parallel.offload_layers} under fp8, where layers keep 8-bit copies of weights among their "
            "activations, which would go to the host in each pass; use bf16, or set parallel.offload_layers=0",
        )


def moment_violations(
    optimizer: OptimizerConfig, parallel: ParallelConfig, precision: Precision
) -> Iterator[tuple[str, str]]:
    """Yield what stands against moments that are kept in bf16.

    A moment moves by a share of 1 - beta towards the new value. Where that share is below half of bf16's last place,
    rounding takes the change back: a moment then never gets smaller, however small the gradients become.

    Args:
        optimizer: The section.
        parallel: The layout.
        precision: Dtype of parameters and activations.

    Yields:
        The paths of the fields that do not fit, and what is wrong in words.
    """
    if optimizer.moment_dtype is not MomentDtype.BF16:
        return
    if not parallel.distributed_optimizer:
        yield (
            "optimizer.moment_dtype parallel.distributed_optimizer",
            "found bf16, which needs Megatron's distributed optimizer; set parallel.distributed_optimizer=true",
        )
    if precision is Precision.FP32:
        yield (
            "optimizer.moment_dtype train.precision",
            "found bf16 under train.precision fp32, where all of training is float32; use fp32",
        )
    for name in ("beta1", "beta2"):
        beta = getattr(optimizer, name)
        if 1.0 - beta < BF16_ROUNDING:
            yield (
                f"optimizer.moment_dtype optimizer.{name}",
                f"found bf16 and {name} {beta:g}: a step changes a moment by {1.0 - beta:.1g} of its value, and "
                f"rounding to bf16 takes back changes below {BF16_ROUNDING:.2g}; use fp32, or {name} of at most "
                f"{1.0 - BF16_ROUNDING:.3f}, such as 0.95",
            )
