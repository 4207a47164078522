"""The recipe: everything a run is asked to do, as frozen dataclasses, one per YAML section.

This file only declares. Reading YAML and overrides is `load`, checking values against each other is `check`.
Derived numbers (tokens per view, layers per stage, ...) are functions in `planning`, never fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_deepstack.config.choices import (
    Activation,
    Batching,
    Compression,
    EncoderPlacement,
    Fp8Scaling,
    GridRule,
    ImageResize,
    Layers,
    LoraTarget,
    LrSchedule,
    Orientation,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
    Sampler,
    SaveMode,
    Unreadable,
    Variant,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower, a ViT of CLIP's or SigLIP's type."""

    image_size: int = 336
    """Side of a view in pixels; also the crop size of the preprocessing."""
    patch_size: int = 14
    """Side of a patch in pixels. What is left of `image_size` beyond whole patches is not seen, as in 384 / 14."""
    hidden_size: int = 1024
    """Width of the tower."""
    ffn_hidden_size: int = 4096
    """Width of its MLP."""
    num_layers: int = 24
    """Number of its transformer layers."""
    num_heads: int = 16
    """Number of attention heads."""
    activation: Activation = Activation.QUICK_GELU
    """Activation of its MLP."""
    select_layer: int = -2
    """Hidden state used as feature, numbered as by Hugging Face: -1 is the last layer's output, -2 its input."""
    class_token: bool = True
    """CLIP's embedding: class token before the patches (dropped from the features), norm after them, no bias.
    Without it SigLIP's: no token, no norm, a bias."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of its LayerNorms."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean (RGB, range 0..1) subtracted from pixels."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel standard deviation (RGB, range 0..1) pixels are divided by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """The decoder, a LLaMA-type transformer."""

    vocab_size: int = 32000
    """Number of token ids; must cover the tokenizer's."""
    hidden_size: int = 4096
    """Width of the decoder."""
    ffn_hidden_size: int = 11008
    """Width of the SwiGLU MLP."""
    num_layers: int = 32
    """Number of decoder layers."""
    num_heads: int = 32
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); equal to `num_heads` if absent."""
    head_dim: int | None = None
    """Width of a head; `hidden_size / num_heads` if absent."""
    norm_epsilon: float = 1e-5
    """Epsilon of the RMSNorms."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    tied_embeddings: bool = False
    """Input embedding and output layer share their weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackConfig:
    """How high-resolution crops become stacks, and before which layers they are added (paper section 3)."""

    num_crops: int = 4
    """Most crops an image may have; also the number of stacks of DeepStack-L."""
    grid: GridRule = GridRule.BEST_FIT
    """Rule that picks the grid of crops."""
    sampler: Sampler = Sampler.DILATED_2D
    """How stacks are sampled from the mosaic."""
    start: int = 1
    """0-based global layer (decoder layer; ViT layer for DeepStack-V) before which stack 0 is added."""
    interval: int = 1
    """Distance in layers between successive stacks."""
    slots: tuple[int, ...] | None = None
    """Explicit layer of each stack; replaces `start` and `interval`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The multimodal model."""

    variant: Variant = Variant.DEEPSTACK_L
    """Member of the family."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Decoder."""
    stacks: StackConfig = field(default_factory=StackConfig)
    """Stacks and their slots."""
    layers: Layers = Layers.AUTO
    """Layer implementations: Transformer Engine where it can run, else Megatron's local layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read: raw data for `preprocess`, the finished store for `train`."""

    records: tuple[str, ...] | None = None
    """For `preprocess`: LLaVA-style JSON or JSON-lines files (also .gz), or WebDataset tar shards; one or several
    paths, URLs or glob patterns."""
    images: str | None = None
    """Folder or URL that the records' image paths are relative to; tar shards bring their own."""
    tokenizer: str | None = None
    """SentencePiece model file, or a Hugging Face tokenizer: its tokenizer.json, or the folder that holds it."""
    template: str = "v1"
    """Conversation template: `plain`, `v1` (Vicuna), `llama_3` or `qwen` (ChatML)."""
    store: str | None = None
    """zarr store written by `preprocess`, read by `train`: a folder, or a URL of an object store."""
    stores: tuple[str, ...] | None = None
    """Several stores to train on, in place of `store`."""
    weights: tuple[float, ...] | None = None
    """Share of the samples drawn from each of `stores`, in any unit; by their numbers of samples if absent."""
    validation_store: str | None = None
    """Held-out zarr store."""
    resize: ImageResize = ImageResize.PILLOW
    """Resizing kernel; `pillow` is bit-equal to the published preprocessing."""
    orientation: Orientation = Orientation.AS_STORED
    """Whether photos are turned as their EXIF tag says; the published preprocessing does not."""
    compression: Compression = Compression.NONE
    """Codec of the views; `zstd` takes about a quarter less space and reads slower."""
    max_image_pixels: int = 178_956_970
    """Images with more pixels are quarantined before they are decoded."""
    max_quarantined: float = 0.05
    """Share of images that may be quarantined before the job stops."""
    max_image_seconds: float = 60.0
    """An image that takes longer to read and decode is quarantined."""
    images_per_part: int = 64
    """Images per part, the unit of work and of resuming."""
    verify_checksums: bool = True
    """Check each view's crc32c when it is read."""
    cache_dir: str | None = None
    """Folder for local copies of what is read of stores in an object store; a temporary one if absent."""
    cache_gib: float = 64.0
    """Most GiB of such copies kept on a node, of views, tokens and index arrays; the least recently used go first."""
    unreadable: Unreadable = Unreadable.STOP
    """A sample whose views cannot be read stops the run with its id, or is left out of the loss and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is laid out over ranks."""

    tensor: int = 1
    """Tensor-parallel ranks (tp)."""
    pipeline: int = 1
    """Pipeline stages (pp)."""
    virtual_pipeline: int = 1
    """Model chunks per stage (vpp); above 1 the interleaved schedule runs."""
    context: int = 1
    """Context-parallel ranks (cp)."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence."""
    layers_per_stage: tuple[int, ...] | None = None
    """Decoder layers of each stage in order, chunk by chunk under vpp; an even split if absent. 0 is allowed
    where the stage holds the embedding, the head or other layers, or where the decoder is frozen."""
    encoder_placement: EncoderPlacement = EncoderPlacement.SPREAD
    """Where ViT and projector run."""
    encoder_chunk_views: int = 0
    """Views whose ViT activations are kept at once when the ViT is trained; 0 keeps all, else the rest is re-run."""
    distributed_optimizer: bool = False
    """Shard optimizer states over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = True
    """Reduce the decoder's gradients over data-parallel ranks beside what is left of the schedule and the encoder's
    backward, from the second step of a start on. (Stages after the first have one bucket for each chunk.)"""
    recompute: Recompute = Recompute.NONE
    """Activation recomputation."""
    recompute_method: RecomputeMethod = RecomputeMethod.UNIFORM
    """Grouping of layers under full recomputation."""
    recompute_num_layers: int = 1
    """Layers per recomputed group (uniform) or recomputed layers per chunk (block)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower; `lr` if absent (published: 2e-6)."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; `lr` if absent."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: LrSchedule = LrSchedule.COSINE
    """Shape after warm-up."""
    warmup_fraction: float = 0.03
    """Share of all steps in which the rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (norms and biases have none)."""
    vision_weight_decay: float | None = None
    """Weight decay of the vision tower; `weight_decay` if absent."""
    projector_weight_decay: float | None = None
    """Weight decay of the projector; `weight_decay` if absent."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.999
    """Adam's second moment decay."""
    epsilon: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 128
    """Samples per step over all data-parallel ranks."""
    micro_batch_size: int = 1
    """Samples per micro-batch and replica."""
    seq_length: int = 2048
    """Longest sequence in tokens, visual tokens included; a longer sample is an error unless `truncate`."""
    batching: Batching = Batching.PADDED
    """`packed` fills rows of up to `seq_length` tokens with whole samples, which do not see each other; each row is a
    micro-batch, so `micro_batch_size` is 1. The result is the same, with less padding."""
    truncate: bool = False
    """Cut samples longer than `seq_length` instead of refusing them."""
    seed: int = 1234
    """Seed of initialisation and sample order."""
    precision: Precision = Precision.BF16
    """Dtype of parameters and activations."""
    fp8_scaling: Fp8Scaling = Fp8Scaling.TENSORWISE
    """Scaling of FP8 tensors under `precision: fp8`."""
    trainable: tuple[Part, ...] = (Part.PROJECTOR, Part.LANGUAGE)
    """Parts that learn; the others are frozen."""
    init_from: tuple[str, ...] | None = None
    """Checkpoint to start from (Hugging Face folder or file), or several that hold different parts of the model, such
    as a decoder's and a vision tower's; parts in none of them are initialised at random."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised matrices; narrow models learn sooner from a larger one."""
    log_interval: int = 1
    """Steps between log lines."""
    validation_interval: int = 0
    """Steps between evaluations on `data.validation_store`; 0 for never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saving."""

    interval: int = 500
    """Steps between checkpoints; the last step is always saved. 0 saves only the last."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good, besides the newest; 0 for none."""
    mode: SaveMode = SaveMode.ASYNC
    """`async`: training goes on while the files are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear layers (LoRA, arXiv 2106.09685); their layers' weights are frozen."""

    rank: int = 0
    """Rank of the adapters; 0 for none."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = tuple(LoraTarget)
    """Adapted linear layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """When a run is called sick, and what is done."""

    max_skipped_steps: int = 10
    """Steps with a loss or gradient that is not finite are skipped; the run stops at more than this many in a row."""
    spike_factor: float = 2.0
    """A loss above this many times the median of the last `spike_window` steps, and above it by more than 0.1, is
    flagged with its samples; 0: never."""
    spike_window: int = 100
    """Steps that the median of losses is taken over; nothing is flagged before half of them are done."""
    max_unreadable_samples: int = 100
    """Samples that may be left out under `data.unreadable: skip` before the run stops."""
    straggler_factor: float = 1.5
    """A rank whose own work took this many times the median rank's over `straggler_window` steps is named; 0: never."""
    straggler_window: int = 20
    """Steps between comparisons of the ranks' times; 0: never."""
    hang_seconds: float = 600.0
    """A longer step is a hang: every rank prints its stacks, silent ranks are named, the run ends. 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides console, JSON lines and TensorBoard, and what is measured for them."""

    wandb_project: str | None = None
    """Weights & Biases project; needs the extra `wandb`."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device, for MFU; known for common GPUs, and none on a CPU."""
    profile_steps: tuple[int, ...] = ()
    """1-based steps recorded with torch.profiler on `profile_ranks`, as Chrome traces in RUN/profile."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""
    timeline_steps: tuple[int, ...] = ()
    """1-based steps whose pipeline timeline (which rank did what when) is recorded, for the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """How `launch` runs the job on a Ray cluster."""

    ranks: int | None = None
    """Worker processes, one per GPU (or per CPU slot where no node has a GPU); one replica of the model if absent."""
    cpus_per_rank: int = 1
    """CPUs set aside for each rank."""
    max_failures: int = 3
    """Restarts of the whole gang after a worker or node died."""
    start_seconds: float = 600.0
    """Longest wait for the ranks' resources."""
    storage: str | None = None
    """Folder shared by all nodes for Ray Train's own records; RUN/ray if absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run."""

    name: str = "run"
    """Name in logs and reports."""
    run_dir: str = "runs/run"
    """Folder of the run: resolved recipe, metrics, TensorBoard, checkpoints, report."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it learns from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """What counts as trouble."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """The job on a Ray cluster."""
