"""The choices a recipe offers: one enum per question that has named answers.

`Variant` is defined in `traits.variants`, beside the table that describes each variant, and is exported here as well.
"""

from __future__ import annotations

from enum import StrEnum

from megatron_deepstack.config.traits.variants import Variant as Variant


class Sampler(StrEnum):
    """How the mosaic of crops is divided into stacks. `planning.exchange.samplers` defines what each sampler does."""

    DILATED_2D = "2d"
    SEQUENTIAL_1D = "1d"
    GRID = "grid"


class GridRule(StrEnum):
    """How many crops an image gets."""

    BEST_FIT = "best_fit"
    FIXED_2X2 = "fixed_2x2"


class Activation(StrEnum):
    """Activation of an MLP. The tables of towers and decoder families say which of them each may have."""

    QUICK_GELU = "quick_gelu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"


class RopeType(StrEnum):
    """How a decoder's rotary positions are scaled to sequences longer than those of its first training."""

    DEFAULT = "default"
    """Not at all."""
    LINEAR = "linear"
    """All frequencies are divided by one factor."""
    LLAMA3 = "llama3"
    """Only slow frequencies are, with a transition, as in Llama 3.1."""
    YARN = "yarn"
    """The transition is one over the numbers of frequencies, and attention scores grow (arXiv 2309.00071)."""


class EncoderPlacement(StrEnum):
    """Where ViT and projector run: over all ranks of a replica, or inside the first stage's forward."""

    SPREAD = "spread"
    INLINE = "inline"


class Recompute(StrEnum):
    """Activation recomputation in the decoder."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class RecomputeMethod(StrEnum):
    """How full recomputation groups layers (Megatron-Core's `recompute_method`)."""

    UNIFORM = "uniform"
    BLOCK = "block"


class Precision(StrEnum):
    """Dtype of parameters and activations; gradients and optimizer states are always float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    """Like bf16, but Transformer Engine computes the decoder's matrix products in 8 bits, on GPUs that support it."""


class Fp8Scaling(StrEnum):
    """How FP8 tensors are scaled (Megatron-Core's `fp8_recipe`)."""

    TENSORWISE = "tensorwise"
    DELAYED = "delayed"
    BLOCKWISE = "blockwise"
    MXFP8 = "mxfp8"


class Part(StrEnum):
    """A part of the model that can be trained or frozen as a whole."""

    VISION = "vision"
    PROJECTOR = "projector"
    LANGUAGE = "language"


class Batching(StrEnum):
    """How samples become sequences: each padded to the step's longest, or several packed into one."""

    PADDED = "padded"
    PACKED = "packed"


class RowLength(StrEnum):
    """How long the rows of a step are."""

    NEEDED = "needed"
    FULL = "full"


class LrSchedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Template(StrEnum):
    """How a conversation is written as text."""

    PLAIN = "plain"
    V1 = "v1"
    """The template of Vicuna."""
    LLAMA_3 = "llama_3"
    QWEN = "qwen"
    """The template ChatML."""
    QWEN3_VL = "qwen3_vl"
    """ChatML with images between control tokens, tools and their calls."""
    GRANITE_4 = "granite_4"
    """Turns between the control tokens of Granite's roles."""


class ImageResize(StrEnum):
    """Resizing kernel of the preprocessing."""

    PILLOW = "pillow"
    TORCH = "torch"


class Orientation(StrEnum):
    """Whether a photo is turned as its EXIF orientation says."""

    AS_STORED = "as_stored"
    EXIF = "exif"


class DeepGrey(StrEnum):
    """How grey images of more than 8 bits are read. In the published preprocessing values above 255 become white."""

    AS_PUBLISHED = "as_published"
    SCALE = "scale"


class Compression(StrEnum):
    """Codec of a store's views."""

    NONE = "none"
    ZSTD = "zstd"
    """The codec Blosc with zstd and bit shuffle."""


class Unreadable(StrEnum):
    """What training does when the views of a sample cannot be read."""

    STOP = "stop"
    SKIP = "skip"


class SaveMode(StrEnum):
    """Whether training waits for a checkpoint's files."""

    ASYNC = "async"
    SYNC = "sync"


class LoraTarget(StrEnum):
    """Linear layers of a transformer layer that LoRA can adapt."""

    QKV = "qkv"
    ATTENTION_OUTPUT = "attention_output"
    MLP_IN = "mlp_in"
    MLP_OUT = "mlp_out"


class Layers(StrEnum):
    """Which Megatron layer implementations are built."""

    AUTO = "auto"
    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


class Switch(StrEnum):
    """Whether something optional is done. (`on` and `off` would be truth values in YAML.)"""

    AUTO = "auto"
    """Where the hardware, the packages and the rest of the recipe allow it."""
    ALWAYS = "always"
    """An error where it is impossible."""
    NEVER = "never"


class OptIn(StrEnum):
    """Whether something is done that nobody gets without asking for it."""

    NEVER = "never"
    ALWAYS = "always"
    """An error where it is impossible."""


class ScoreMetric(StrEnum):
    """Scores of answers; what each computes is in `scores.metrics`."""

    EXACT_MATCH = "exact_match"
    VQA_ACCURACY = "vqa_accuracy"
    ANLS = "anls"
    RELAXED_ACCURACY = "relaxed_accuracy"


class GradientDtype(StrEnum):
    """Number format of the gradient buffers."""

    FP32 = "fp32"
    BF16 = "bf16"


class MomentDtype(StrEnum):
    """Number format of Adam's two moments."""

    FP32 = "fp32"
    BF16 = "bf16"


class RecomputeModule(StrEnum):
    """Parts of a decoder layer that `recompute: selective` computes again (Megatron-Core's `recompute_modules`)."""

    CORE_ATTENTION = "core_attn"
    MLP = "mlp"
    """The MLP, or all that stands in its place where a layer has experts."""
    LAYER_NORM = "layernorm"
    """The norms before attention and MLP, where they are modules of their own: in local layers, beside adapters, and
    before experts. Transformer Engine's other layers compute norm and linear in one."""
    EXPERT_ACTIVATION = "moe_act"
    """What experts compute between their two linears, where they are one grouped product (Transformer Engine)."""
