"""The sections `model` and `lora`: vision tower, decoder, stacks, and adapters.

The defaults are the published DeepStack-L with the parts of LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, and Vicuna 7B.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_deepstack.config.choices import Activation, GridRule, Layers, LoraTarget, RopeType, Sampler, Variant
from megatron_deepstack.config.constraints import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Matches, Unit

_TILE_GRID = Matches("[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", 'grids of tiles, columns x rows, such as ["2x1", "2x2"]')


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower.

    `architecture: NAME` (such as `clip_vit_l14_336`) stands for all numbers of a published tower; keys beside it
    override them.
    """

    kind: str = "clip"
    """Kind of tower: `clip`, `siglip`, or the name of a tower that your own program registered. The earlier spelling of
    the first two, `class_token: true` or `false`, is still read."""
    image_size: Annotated[int, POSITIVE, Unit("pixels")] = 336
    """Side of a view; also the side of the crops that the preprocessing cuts. The default is CLIP ViT-L/14-336's."""
    patch_size: Annotated[int, POSITIVE, Unit("pixels")] = 14
    """Side of a patch. Pixels of a view beyond the last whole patch are ignored, as with 384 / 14."""
    hidden_size: Annotated[int, POSITIVE] = 1024
    """Width of the tower's hidden states. The default is CLIP ViT-L's."""
    ffn_hidden_size: Annotated[int, POSITIVE] = 4096
    """Width of the MLP in each of its layers. The default is CLIP ViT-L's."""
    num_layers: Annotated[int, POSITIVE, Unit("layers")] = 24
    """Number of its transformer layers, including those that `select_layer` leaves unused. The default is CLIP
    ViT-L's."""
    num_heads: Annotated[int, POSITIVE, Unit("heads")] = 16
    """Number of attention heads; they must divide `hidden_size`."""
    activation: Activation = Activation.QUICK_GELU
    """Activation of its MLPs: `quick_gelu` is CLIP's, `gelu_tanh` is SigLIP's."""
    select_layer: int = -2
    """Hidden state that is used as the feature, numbered as in Hugging Face: -1 is the output of the last layer, -2 is
    its input. The default is the value that LLaVA and DeepStack publish."""
    layernorm_epsilon: Annotated[float, POSITIVE] = 1e-5
    """Epsilon of its LayerNorms. The default is CLIP's; SigLIP has 1e-6."""
    temporal_patch_size: Annotated[int, POSITIVE, Unit("frames")] = 1
    """Frames of a patch. With 2, as in Qwen3-VL, a picture is taken as two equal frames."""
    merge_size: Annotated[int, POSITIVE, Unit("patches")] = 1
    """Patches in each direction that become one visual token; Qwen3-VL has 2. Only towers for views of any size merge
    patches."""
    num_positions: Annotated[int, POSITIVE] | None = None
    """Entries of the table of learned positions, which is square and is interpolated to the size of a view; one for
    each patch of a view if null. Qwen3-VL has 2304."""
    taps: tuple[Annotated[int, NOT_NEGATIVE], ...] = ()
    """Layers, counted from 0, whose output becomes a stack through a merger of its own, in the order of the mergers.
    The stacks enter the decoder in ascending order of these layers. Qwen3-VL 8B has 8, 16 and 24."""
    tile_grids: tuple[Annotated[str, _TILE_GRID], ...] = ()
    """Grids of tiles that an image may be cut into, columns x rows, in the order of the published
    `image_grid_pinpoints`: the one that keeps most of the image is taken, and the first of those that keep as much. A
    tile is a view of `image_size`. Only for models with padded tiles, such as Granite 4 Vision."""
    rope_theta: Annotated[float, POSITIVE] = 10000.0
    """Base of the tower's rotary positions over lines and columns; used only by towers that have them. The default is
    Qwen3-VL's."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each channel (red, green, blue; range 0 to 1), subtracted from the pixels. The default is CLIP's."""
    std: tuple[Annotated[float, POSITIVE], Annotated[float, POSITIVE], Annotated[float, POSITIVE]] = (
        0.26862954,
        0.26130258,
        0.27577711,
    )
    """Standard deviation of each channel (red, green, blue; range 0 to 1), by which the pixels are divided. The default
    is CLIP's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig:
    """How the rotary positions of the decoder are scaled to long sequences, in the words of transformers' config.json
    (`rope_parameters`, earlier `rope_scaling`). A checkpoint must say the same."""

    rope_type: RopeType = RopeType.DEFAULT
    """Kind of scaling: `default` for none, `linear` as in Vicuna-16k, `llama3` as in Llama 3.1 to 3.3, `yarn` as for
    long sequences of Qwen2.5 and Qwen3."""
    factor: Annotated[float, AT_LEAST_ONE] | None = None
    """Number by which frequencies are divided: how many times longer sequences may be. Every kind but `default` needs
    it."""
    original_max_position_embeddings: Annotated[int, POSITIVE, Unit("tokens")] | None = None
    """Longest sequence of the first training; `llama3` and `yarn` need it."""
    low_freq_factor: Annotated[float, POSITIVE] = 1.0
    """`llama3` divides frequencies in full that turn fewer times than this within the original length."""
    high_freq_factor: Annotated[float, POSITIVE] = 4.0
    """`llama3` leaves frequencies as they are that turn more often than this within the original length."""
    beta_fast: Annotated[float, POSITIVE] = 32.0
    """`yarn` leaves frequencies as they are that turn more often than this within the original length."""
    beta_slow: Annotated[float, POSITIVE] = 1.0
    """`yarn` divides frequencies in full that turn fewer times than this within the original length."""
    attention_factor: Annotated[float, POSITIVE] | None = None
    """Factor of rotated queries and of rotated keys under `yarn`; if null, it follows from `factor`, `mscale` and
    `mscale_all_dim`."""
    mscale: Annotated[float, NOT_NEGATIVE] | None = None
    """Weight of the logarithm of `factor` in the numerator of that factor."""
    mscale_all_dim: Annotated[float, NOT_NEGATIVE] | None = None
    """The same in its denominator; both count only together."""
    truncate: bool = True
    """Whether the bounds of the transition of `yarn` are rounded to whole numbers of frequencies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """The decoder, a LLaMA-type transformer.

    `architecture: NAME` (such as `vicuna_7b` or `qwen3_8b`) stands for all numbers of a published decoder; keys beside
    it override them.
    """

    family: str | None = None
    """Family of the decoder: `llama`, `mistral`, `qwen2`, `qwen3`, or the name of a family that your own program
    registered. If null, `qkv_bias` and `qk_norm` determine the family."""
    vocab_size: Annotated[int, POSITIVE, Unit("tokens")] = 32000
    """Number of token ids; it must be at least the tokenizer's. The default is LLaMA's."""
    hidden_size: Annotated[int, POSITIVE] = 4096
    """Width of the decoder's hidden states. The default is LLaMA 7B's."""
    ffn_hidden_size: Annotated[int, POSITIVE] = 11008
    """Width of the SwiGLU MLP in each layer. The default is LLaMA 7B's."""
    num_layers: Annotated[int, POSITIVE, Unit("layers")] = 32
    """Number of decoder layers. The default is LLaMA 7B's."""
    num_heads: Annotated[int, POSITIVE, Unit("heads")] = 32
    """Number of query heads. The default is LLaMA 7B's."""
    num_kv_heads: Annotated[int, POSITIVE, Unit("heads")] | None = None
    """Number of key/value heads (grouped-query attention); equal to `num_heads` if null, which is plain multi-head
    attention."""
    head_dim: Annotated[int, POSITIVE] | None = None
    """Width of one head; `hidden_size / num_heads` if null. Some decoders, such as Qwen3's, have another width."""
    norm_epsilon: Annotated[float, POSITIVE] = 1e-5
    """Epsilon of the RMSNorms. The default is LLaMA 2's; Qwen's decoders have 1e-6."""
    rope_theta: Annotated[float, POSITIVE] = 10000.0
    """Base of the rotary position embedding. The default is LLaMA's; newer decoders have larger ones."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """How rotary positions are scaled to long sequences."""
    mrope_section: tuple[int, int, int] | None = None
    """Number of frequencies of a head that turn by time, by line and by column, for a decoder with positions on three
    axes; Qwen3-VL has 24, 20 and 20. Null for the one axis of other decoders."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias, as in Qwen2."""
    qk_norm: bool = False
    """Each query and key head passes an RMSNorm, as in Qwen3."""
    embedding_multiplier: Annotated[float, POSITIVE] = 1.0
    """Factor of the embeddings, as in Granite."""
    attention_multiplier: Annotated[float, POSITIVE] | None = None
    """Factor of attention scores, as in Granite; one over the root of the width of a head if null."""
    residual_multiplier: Annotated[float, POSITIVE] = 1.0
    """Factor of what attention and MLP add to the hidden states, as in Granite."""
    logits_scaling: Annotated[float, POSITIVE] = 1.0
    """Number by which logits are divided, as in Granite."""
    tied_embeddings: bool = False
    """Input embedding and output layer share one weight, as in the smaller Qwen decoders."""
    num_experts: Annotated[int, NOT_NEGATIVE] = 0
    """Experts of each layer that has experts, in a decoder of a family that has them, such as `qwen3_vl_moe`; 0 for the
    one MLP of other decoders. Qwen3-VL 30B-A3B has 128."""
    num_active_experts: Annotated[int, POSITIVE] = 8
    """Experts to which the router sends each token. The default is Qwen3-VL 30B-A3B's."""
    expert_ffn_hidden_size: Annotated[int, POSITIVE] = 768
    """Width of the SwiGLU MLP of one expert. The default is Qwen3-VL 30B-A3B's."""
    expert_interval: Annotated[int, POSITIVE, Unit("layers")] = 1
    """Distance between layers with experts: with 2, the second, the fourth, and so on have experts, and the others the
    one MLP of width `ffn_hidden_size`."""
    dense_layers: tuple[Annotated[int, NOT_NEGATIVE], ...] = ()
    """Layers, counted from 0, that have no experts whatever `expert_interval` says."""
    balance_loss: Annotated[float, NOT_NEGATIVE] = 0.001
    """Factor of the loss that makes the router use all experts equally often, which is added to the loss of the text;
    0 for none. The default is Qwen3-VL's. Only a decoder with experts has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackConfig:
    """How high-resolution crops become stacks, and before which layers they are added (paper section 3)."""

    num_crops: Annotated[int, POSITIVE, Unit("crops")] = 4
    """Largest number of crops of an image, and the number of stacks of DeepStack-L. The paper found four to be best."""
    grid: GridRule = GridRule.BEST_FIT
    """Rule that picks an image's grid of crops: `best_fit` takes the grid of up to `num_crops` crops that fits the
    shape of the image best, `fixed_2x2` always takes two by two."""
    sampler: Sampler = Sampler.DILATED_2D
    """How stacks are sampled from the mosaic of crops. `2d` takes every n-th token in both directions, so that each
    stack shows the whole image, as published. `1d` takes every n-th token of the mosaic's rows written one after
    another, and `grid` takes one crop per stack."""
    num_stacks: Annotated[int, POSITIVE, Unit("stacks")] | None = None
    """Number of an image's stacks that are added in the decoder, the first ones; the others are left out. If null, all
    are added: one for each crop, or DeepStack-HD's four. The paper compares numbers of stacks."""
    start: Annotated[int, NOT_NEGATIVE, Unit("layers")] = 1
    """Layer before which stack 0 is added, counted from 0 over the whole model: a decoder layer, or a ViT layer for
    DeepStack-V."""
    interval: Annotated[int, NOT_NEGATIVE, Unit("layers")] = 1
    """Distance between the layers of successive stacks."""
    slots: tuple[int, ...] | None = None
    """Layer of each stack in order, counted from 0. If null, `start` and `interval` determine the layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig:
    """The window Q-Formers of Granite 4 Vision, one for each stack: learned queries in each window of a view attend to
    the patches of that window. Other models have none. The defaults are the published ones."""

    query_side: Annotated[int, POSITIVE, Unit("tokens")] = 4
    """Tokens on one side of a window afterwards."""
    window_side: Annotated[int, POSITIVE, Unit("patches")] = 8
    """Patches on one side of a window; the patches of a view must be a multiple."""
    num_sampled: Annotated[int, NOT_NEGATIVE, Unit("stacks")] = 4
    """Number of the last stacks, at most four, whose queries begin with one patch of each 2x2, the k-th of them; the
    queries of the others begin with averages."""
    num_layers: Annotated[int, POSITIVE, Unit("layers")] = 1
    """Number of layers of each Q-Former."""
    num_heads: Annotated[int, POSITIVE, Unit("heads")] = 18
    """Number of its attention heads; they must divide the width of the tower."""
    ffn_hidden_size: Annotated[int, POSITIVE] = 3072
    """Width of the MLP in each of its layers."""
    cross_attention_interval: Annotated[int, POSITIVE, Unit("layers")] = 1
    """Distance between the layers that attend to patches; the first does."""
    activation: Activation = Activation.GELU
    """Activation of its MLPs."""
    layernorm_epsilon: Annotated[float, POSITIVE] = 1e-12
    """Epsilon of its LayerNorms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The multimodal model."""

    variant: Variant = Variant.DEEPSTACK_L
    """Which model of the family is trained: DeepStack with stacks in the decoder (`deepstack_l`, `deepstack_hd`) or in
    the vision tower (`deepstack_v`), or one of the baselines that the paper compares with."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """The decoder."""
    stacks: StackConfig = field(default_factory=StackConfig)
    """The stacks and their slots."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    """The Q-Formers that make stacks of Granite 4 Vision."""
    layers: Layers = Layers.AUTO
    """Implementation of the layers: `auto` takes Transformer Engine where it can run, and otherwise Megatron's local
    layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters beside linear layers (LoRA, arXiv 2106.09685). The weights of a part that has adapters are
    frozen: of the decoder, and of the vision tower and the projector where they have some."""

    rank: Annotated[int, NOT_NEGATIVE] = 0
    """Rank of the adapters. With 0 there are no adapters, and the weights themselves learn."""
    alpha: Annotated[float, POSITIVE] = 16.0
    """The output of the adapters is multiplied by alpha / rank."""
    targets: tuple[LoraTarget, ...] = tuple(LoraTarget)
    """Linear layers of the decoder that get an adapter. The default is all four of a layer."""
    vision_targets: tuple[LoraTarget, ...] = ()
    """Linear layers of the vision tower that get an adapter. They learn where `train.trainable` has `vision`."""
    projector: bool = False
    """Every linear layer of the projector (also of mergers and Q-Formers) gets an adapter. They learn where
    `train.trainable` has `projector`."""
