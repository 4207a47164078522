"""The sections about training: layout over ranks, optimizer, and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_deepstack.config.choices import (
    Batching,
    EncoderPlacement,
    Fp8Scaling,
    LrSchedule,
    MomentDtype,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
    RowLength,
    Switch,
)
from megatron_deepstack.config.constraints import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, PathKind, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is laid out over ranks. One replica takes tensor x pipeline x context ranks; further ranks form
    further replicas."""

    tensor: Annotated[int, POSITIVE, Unit("ranks")] = 1
    """Ranks that share each layer's matrices (tensor parallelism, tp)."""
    pipeline: Annotated[int, POSITIVE, Unit("stages")] = 1
    """Stages that the decoder's layers are spread over (pipeline parallelism, pp)."""
    virtual_pipeline: Annotated[int, POSITIVE, Unit("chunks")] = 1
    """Model chunks of each stage (vpp). Above 1 the interleaved schedule runs, in which ranks wait less and communicate
    more."""
    context: Annotated[int, POSITIVE, Unit("ranks")] = 1
    """Ranks that share each sequence (context parallelism, cp)."""
    expert: Annotated[int, POSITIVE, Unit("ranks")] = 1
    """Ranks of a stage that share the experts of each layer (expert parallelism, ep); they may belong to several
    replicas. It divides the number of experts, and tensor x context x replicas. An expert is never split."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence, which saves memory. It needs `tensor` above
    1; a decoder with experts needs it where `tensor` is above 1."""
    layers_per_stage: tuple[Annotated[int, NOT_NEGATIVE], ...] | None = None
    """Number of decoder layers of each stage in order, chunk by chunk under `virtual_pipeline`; an even split if null.
    0 is allowed if the stage holds the embedding, the head or other layers, or if the decoder is frozen."""
    encoder_placement: EncoderPlacement = EncoderPlacement.SPREAD
    """Where ViT and projector run: `spread` over all ranks of a replica, or `inline` in the forward pass of the first
    stage."""
    encoder_chunk_views: Annotated[int, NOT_NEGATIVE, Unit("views")] = 0
    """Number of views whose ViT activations are kept at a time when the ViT is trained; the others are computed again
    in the backward pass. 0 keeps all."""
    encoder_memory_gib: Annotated[float, NOT_NEGATIVE, Unit("GiB")] = 0.0
    """Memory of each rank for ViT activations when the ViT is trained. It takes the place of `encoder_chunk_views`: as
    many views are kept at a time as fit into it, or one view that does not fit. 0 sets no bound."""
    rows_on_host: Switch = Switch.AUTO
    """Whether the received rows of a step rest in page-locked memory of the host, and the device holds those of a few
    micro-batches at a time. `auto`: where they take more than 15 % of the device's memory, so never on a CPU."""
    distributed_optimizer: bool = False
    """Split the optimizer's states over data-parallel ranks (ZeRO-1), instead of a copy on each of them."""
    overlap_grad_reduce: bool = True
    """Reduce the decoder's gradients over data-parallel ranks while the rest of the schedule and the encoder's backward
    are still running. The first step after each start does not overlap. (Stages after the first have one bucket for
    each chunk.)"""
    recompute: Recompute = Recompute.NONE
    """Which activations of the decoder are computed again in the backward pass instead of kept: none, those of
    attention (`selective`), or all (`full`)."""
    recompute_method: RecomputeMethod = RecomputeMethod.UNIFORM
    """How `recompute: full` groups layers: `uniform` keeps only the input of every group, `block` recomputes only the
    first layers of each chunk."""
    recompute_num_layers: Annotated[int, POSITIVE, Unit("layers")] = 1
    """Layers of each group under `uniform`, or recomputed layers of each chunk under `block`."""
    recompute_modules: tuple[RecomputeModule, ...] = (RecomputeModule.CORE_ATTENTION,)
    """Parts of each layer that `recompute: selective` computes again: `core_attn`, which saves nothing where attention
    is one fused kernel; `mlp`, which saves most of a layer's activations for about half of its forward pass;
    `layernorm`, whose results cost next to nothing, in layers that do not compute norm and linear in one; `moe_act`,
    what experts compute between their linears, which needs Transformer Engine's grouped products."""
    offload_layers: Annotated[int, NOT_NEGATIVE, Unit("layers")] = 0
    """Decoder layers of each chunk, from the first on, whose activations wait in the host's memory for their backward
    pass; they are copied beside computation, and come back one layer ahead. A larger number means all layers. The last
    layers of a chunk are needed again soonest: leave at least one of them on the device. 0 keeps all there."""
    offload_above_mib: Annotated[float, NOT_NEGATIVE, Unit("MiB")] = 1.0
    """Activations of at most this size stay on the device under `offload_layers`: copying them takes as long as they
    would be away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning rate. The default rates and warm-up are those of the published second training stage."""

    lr: Annotated[float, POSITIVE] = 2e-5
    """Peak learning rate. Published values are 2e-5 in the second training stage, and 1e-3 in the first, where only the
    projector learns."""
    vision_lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Peak learning rate of the vision tower; `lr` if null. The published value where the tower learns is 2e-6."""
    projector_lr: Annotated[float, NOT_NEGATIVE] | None = None
    """Peak learning rate of the projector; `lr` if null."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the last step."""
    schedule: LrSchedule = LrSchedule.COSINE
    """Shape of the learning rate after warm-up. The published one is `cosine`."""
    warmup_fraction: Annotated[float, SHARE] = 0.03
    """Share of all steps during which the rate rises linearly. The default is the published value."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay of matrices; norms and biases have none. The default is the published value."""
    vision_weight_decay: Annotated[float, NOT_NEGATIVE] | None = None
    """Weight decay of the vision tower; `weight_decay` if null."""
    projector_weight_decay: Annotated[float, NOT_NEGATIVE] | None = None
    """Weight decay of the projector; `weight_decay` if null."""
    beta1: Annotated[float, BELOW_ONE] = 0.9
    """Decay of Adam's first moment. The default is AdamW's usual one."""
    beta2: Annotated[float, BELOW_ONE] = 0.999
    """Decay of Adam's second moment. The default is AdamW's usual one."""
    epsilon: Annotated[float, POSITIVE] = 1e-8
    """Number added to the root of the second moment, to avoid a division by 0. The default is AdamW's usual one."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest global norm of the gradient; a larger gradient is scaled down to this norm. 0 switches clipping off."""
    moment_dtype: MomentDtype = MomentDtype.FP32
    """Number format in which Adam's moments are kept between steps. `bf16` saves 4 bytes for each parameter that
    learns. It needs Transformer Engine's AdamW, `parallel.distributed_optimizer`, and a `beta2` of at most 0.996."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop: its length, the size of batches, which parts learn, and the weights it starts from."""

    steps: Annotated[int, POSITIVE, Unit("steps")] = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: Annotated[int, POSITIVE, Unit("samples")] = 128
    """Samples of a step over all data-parallel ranks. The default is that of the published second training stage."""
    micro_batch_size: Annotated[int, POSITIVE, Unit("samples")] = 1
    """Samples that a replica computes at a time."""
    seq_length: Annotated[int, POSITIVE, Unit("tokens")] = 2048
    """Largest length of a sequence, including visual tokens. A longer sample is an error unless `truncate` is true. The
    default is the published value."""
    batching: Batching = Batching.PADDED
    """`padded` fills each sample of a step up to the longest one. `packed` puts several whole samples, which do not see
    each other, into packs of up to `seq_length` tokens; each pack is a micro-batch, so `micro_batch_size` is 1. The
    result is the same, with less padding."""
    row_length: RowLength = RowLength.NEEDED
    """`needed`: rows are as long as the samples of their step need. `full`: every row has `seq_length` tokens, so that
    shapes never change: stages send no shapes before activations, and kernels are chosen once. It costs padding, of
    which packed rows have little."""
    truncate: bool = False
    """Cut samples that are longer than `seq_length`, instead of refusing them."""
    seed: Annotated[int, SEED] = 1234
    """Seed of random initialisation and of the order of samples."""
    precision: Precision = Precision.BF16
    """Number format of parameters and activations; gradients and optimizer states are always float32."""
    fp8_scaling: Fp8Scaling = Fp8Scaling.TENSORWISE
    """How 8-bit tensors are scaled under `precision: fp8`."""
    trainable: tuple[Part, ...] = (Part.PROJECTOR, Part.LANGUAGE)
    """Parts that learn; the others are frozen. The default is that of DeepStack-L's published second training stage."""
    init_from: tuple[Annotated[str, PathKind.LOCAL], ...] | None = None
    """Checkpoint to start from (Hugging Face folder or file), or several that hold different parts of the model, such
    as one of a decoder and one of a vision tower. Parts that none of them holds are initialised at random."""
    init_std: Annotated[float, POSITIVE] = 0.02
    """Standard deviation of randomly initialised matrices. The default is LLaMA's; narrow models learn faster with a
    larger value."""
    log_interval: Annotated[int, POSITIVE, Unit("steps")] = 1
    """Steps between log lines."""
    validation_interval: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 0
    """Steps between evaluations on `data.validation_store`; 0 for never."""
