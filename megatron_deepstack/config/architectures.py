"""Named model sizes: what `architecture: NAME` in a recipe's vision or language section stands for.

The other keys of the section override the named sizes, so `architecture: vicuna_7b` with `num_layers: 4` is a
Vicuna of four layers. The resolved recipe holds the numbers, not the name. Values are those of the published
Hugging Face configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_deepstack.config.choices import Activation, RopeType
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig, VisionConfig

_HALF = (0.5, 0.5, 0.5)
_LLAMA_7B = LanguageConfig()
_LLAMA_13B = LanguageConfig(hidden_size=5120, ffn_hidden_size=13824, num_layers=40, num_heads=40)
_VICUNA_16K = RopeScalingConfig(rope_type=RopeType.LINEAR, factor=4.0)
_LLAMA_3_8B = LanguageConfig(vocab_size=128256, ffn_hidden_size=14336, num_kv_heads=8, rope_theta=500_000.0)
_LLAMA_3_1 = RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=8192)
_LLAMA_3_2_1B = replace(
    _LLAMA_3_8B,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_layers=16,
    head_dim=64,
    rope_scaling=replace(_LLAMA_3_1, factor=32.0),
    tied_embeddings=True,
)

_GRANITE_TILES = (
    *(f"{columns}x1" for columns in range(1, 11)),
    *(f"{columns}x2" for columns in range(1, 6)),
    *(f"{columns}x3" for columns in range(1, 4)),
    *(f"{columns}x{rows}" for rows in (4, 5) for columns in (1, 2)),
    *(f"1x{rows}" for rows in range(6, 11)),
)
_QWEN3_VL_LARGE = VisionConfig(
    kind="qwen3_vl",
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    hidden_size=1152,
    ffn_hidden_size=4304,
    num_layers=27,
    num_heads=16,
    num_positions=2304,
    taps=(8, 16, 24),
    select_layer=-1,
    activation=Activation.GELU_TANH,
    layernorm_epsilon=1e-6,
    mean=_HALF,
    std=_HALF,
)
_QWEN3_VL_SMALL = replace(_QWEN3_VL_LARGE, hidden_size=1024, ffn_hidden_size=4096, num_layers=24, taps=(5, 11, 17))
_QWEN3_VL = LanguageConfig(
    family="qwen3_vl",
    vocab_size=151936,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    norm_epsilon=1e-6,
    rope_theta=5_000_000.0,
    mrope_section=(24, 20, 20),
    qk_norm=True,
)
_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    family="qwen3_vl_moe",
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    num_experts=128,
    num_active_experts=8,
    expert_ffn_hidden_size=768,
)

VISION: Mapping[str, VisionConfig] = {
    "clip_vit_l14_224": VisionConfig(image_size=224),
    "clip_vit_l14_336": VisionConfig(),
    "siglip_so400m_14_384": VisionConfig(
        kind="siglip",
        image_size=384,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_layers=27,
        activation=Activation.GELU_TANH,
        layernorm_epsilon=1e-6,
        mean=_HALF,
        std=_HALF,
    ),
    "granite4_vision_3b": VisionConfig(
        kind="siglip",
        image_size=384,
        patch_size=16,
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_layers=27,
        taps=(8, 14, 20, 26, 26, 26, 26, 26),
        tile_grids=_GRANITE_TILES,
        select_layer=-1,
        activation=Activation.GELU_TANH,
        layernorm_epsilon=1e-6,
        mean=_HALF,
        std=_HALF,
    ),
    "qwen3_vl_2b": _QWEN3_VL_SMALL,
    "qwen3_vl_4b": _QWEN3_VL_SMALL,
    "qwen3_vl_8b": _QWEN3_VL_LARGE,
    "qwen3_vl_32b": _QWEN3_VL_LARGE,
    "qwen3_vl_30b_a3b": _QWEN3_VL_LARGE,
    "qwen3_vl_235b_a22b": _QWEN3_VL_LARGE,
}
"""Published vision towers, by the name that `model.vision.architecture` gives.

SigLIP takes views of 384 pixels and uses only the 27 x 27 whole patches of 14 pixels in them, as published.
"""

LANGUAGE: Mapping[str, LanguageConfig] = {
    "llama2_7b": _LLAMA_7B,
    "llama2_13b": _LLAMA_13B,
    "llama2_70b": LanguageConfig(hidden_size=8192, ffn_hidden_size=28672, num_layers=80, num_heads=64, num_kv_heads=8),
    "vicuna_7b": _LLAMA_7B,
    "vicuna_13b": _LLAMA_13B,
    "vicuna_7b_16k": replace(_LLAMA_7B, rope_scaling=_VICUNA_16K),
    "vicuna_13b_16k": replace(_LLAMA_13B, rope_scaling=_VICUNA_16K),
    "llama3_8b": _LLAMA_3_8B,
    "llama3_1_8b": replace(_LLAMA_3_8B, rope_scaling=_LLAMA_3_1),
    "llama3_1_70b": replace(
        _LLAMA_3_8B, hidden_size=8192, ffn_hidden_size=28672, num_layers=80, num_heads=64, rope_scaling=_LLAMA_3_1
    ),
    "llama3_2_1b": _LLAMA_3_2_1B,
    "llama3_2_3b": replace(_LLAMA_3_2_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128),
    "yi_34b": LanguageConfig(
        vocab_size=64000,
        hidden_size=7168,
        ffn_hidden_size=20480,
        num_layers=60,
        num_heads=56,
        num_kv_heads=8,
        rope_theta=5_000_000.0,
    ),
    "mistral_7b_v0_2": LanguageConfig(ffn_hidden_size=14336, num_kv_heads=8, rope_theta=1_000_000.0),
    "mistral_7b_v0_3": LanguageConfig(vocab_size=32768, ffn_hidden_size=14336, num_kv_heads=8, rope_theta=1_000_000.0),
    "qwen2_1_5b": LanguageConfig(
        vocab_size=151936,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        norm_epsilon=1e-6,
        rope_theta=1_000_000.0,
        qkv_bias=True,
        tied_embeddings=True,
    ),
    "qwen2_7b": LanguageConfig(
        vocab_size=152064,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        norm_epsilon=1e-6,
        rope_theta=1_000_000.0,
        qkv_bias=True,
    ),
    "qwen3_1_7b": LanguageConfig(
        vocab_size=151936,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        norm_epsilon=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        tied_embeddings=True,
    ),
    "qwen3_8b": LanguageConfig(
        vocab_size=151936,
        ffn_hidden_size=12288,
        num_layers=36,
        num_kv_heads=8,
        head_dim=128,
        norm_epsilon=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
    ),
    "granite4_vision_3b": LanguageConfig(
        family="granite",
        vocab_size=100353,
        hidden_size=2560,
        ffn_hidden_size=8192,
        num_layers=40,
        num_heads=40,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=10_000_000.0,
        embedding_multiplier=12.0,
        attention_multiplier=1 / 64,
        residual_multiplier=0.22,
        logits_scaling=10.0,
        tied_embeddings=True,
    ),
    "qwen3_vl_2b": replace(_QWEN3_VL, tied_embeddings=True),
    "qwen3_vl_4b": replace(
        _QWEN3_VL, hidden_size=2560, ffn_hidden_size=9728, num_layers=36, num_heads=32, tied_embeddings=True
    ),
    "qwen3_vl_8b": replace(_QWEN3_VL, hidden_size=4096, ffn_hidden_size=12288, num_layers=36, num_heads=32),
    "qwen3_vl_32b": replace(_QWEN3_VL, hidden_size=5120, ffn_hidden_size=25600, num_layers=64, num_heads=64),
    "qwen3_vl_30b_a3b": _QWEN3_VL_MOE,
    "qwen3_vl_235b_a22b": replace(
        _QWEN3_VL_MOE,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_layers=94,
        num_heads=64,
        expert_ffn_hidden_size=1536,
    ),
}
"""Published decoders, by the name that `model.language.architecture` gives."""
