"""Our recipe in Megatron's words: the TransformerConfigs of decoder and ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.choices import Activation, Fp8Scaling, Precision, Recompute
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, VisionConfig
from megatron_deepstack.config.sizes import head_width, num_kv_heads
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.model.layers.fp8 import fp8_settings
from megatron_deepstack.planning.slots import layers_per_chunk
from megatron_deepstack.platform.compute.device import has_gpu


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP8: torch.bfloat16}
ACTIVATIONS = {
    Activation.QUICK_GELU: _quick_gelu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.SILU: F.silu,
}


def decoder_config(
    language: LanguageConfig,
    parallel: ParallelConfig,
    precision: Precision,
    fp8_scaling: Fp8Scaling = Fp8Scaling.TENSORWISE,
) -> TransformerConfig:
    """TransformerConfig of the decoder under a layout."""
    full = parallel.recompute is Recompute.FULL
    family = family_of(language)
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=num_kv_heads(language),
        kv_channels=head_width(language),
        layernorm_epsilon=language.norm_epsilon,
        qk_layernorm=language.qk_norm,
        softmax_scale=language.attention_multiplier,
        add_bias_linear=family.has_linear_biases,
        add_qkv_bias=language.qkv_bias,
        activation_func=ACTIVATIONS[family.activation],
        gated_linear_unit=True,
        normalization="RMSNorm",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_uneven_layout(language, parallel),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=None if parallel.recompute is Recompute.NONE else parallel.recompute.value,
        recompute_method=parallel.recompute_method.value if full else None,
        recompute_num_layers=parallel.recompute_num_layers if full else None,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=parallel.pipeline > 1,
        **fp8_settings(precision, fp8_scaling),
        **_common(precision),
    )


def vision_config(vision: VisionConfig, precision: Precision) -> TransformerConfig:
    """TransformerConfig of the ViT: not parallel, every rank holds all of it."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=ACTIVATIONS[vision.activation],
        add_bias_linear=True,
        normalization="LayerNorm",
        calculate_per_token_loss=True,
        **_common(precision),
    )


def _common(precision: Precision) -> dict[str, object]:
    dtype = DTYPES[precision]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "use_cpu_initialization": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": has_gpu(),
    }


def _uneven_layout(language: LanguageConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's explicit layout where the recipe names the layers of each stage; also allows a stage without any."""
    if parallel.layers_per_stage is None or parallel.pipeline == 1:
        return None
    rows = [["decoder"] * count for count in layers_per_chunk(language.num_layers, parallel)]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows
