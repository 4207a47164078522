"""The recipe as Megatron's configuration: the TransformerConfigs of decoder and ViT."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.choices import Activation, Fp8Scaling, Precision, Recompute, RecomputeModule
from megatron_deepstack.config.rope_scaling import score_factor
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ParallelConfig, VisionConfig
from megatron_deepstack.config.sizes import expert_layers, head_width, num_kv_heads, recomputed_modules
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers.activation import ACTIVATIONS, identity
from megatron_deepstack.model.layers.decoder_layer import ALL_KEPT, Kept
from megatron_deepstack.model.layers.experts import expert_settings, require_expert_activation
from megatron_deepstack.model.layers.fp8 import fp8_settings
from megatron_deepstack.model.layers.lora import NO_ADAPTERS
from megatron_deepstack.model.layers.speed import PLAIN, Speed
from megatron_deepstack.planning.slots import layers_per_chunk
from megatron_deepstack.platform.compute.device import has_gpu

_GRAPHED_PARTS = (
    "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope"  # since 0.17
)
"""Megatron's name for the parts of a layer that CUDA graphs hold. Its default is deprecated by itself and warns."""
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP8: torch.bfloat16}


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's config of a decoder, and what is kept of its layers for the backward pass."""

    kept: Kept = ALL_KEPT


def decoder_config(
    language: LanguageConfig,
    parallel: ParallelConfig,
    precision: Precision,
    fp8_scaling: Fp8Scaling = Fp8Scaling.TENSORWISE,
    speed: Speed = PLAIN,
    engine: bool = False,
    lora: LoraConfig = NO_ADAPTERS,
) -> DecoderConfig:
    """Megatron's config of the decoder.

    Args:
        language: The decoder.
        parallel: The layout.
        precision: Of parameters and activations.
        fp8_scaling: Used only under the precision `fp8`.
        speed: Which fusions and overlaps are used.
        engine: Whether the layers are Transformer Engine's.
        lora: Adapters of the decoder.

    Returns:
        The config.

    Raises:
        ConfigError: Parts of layers are to be computed again that these layers do not have.
    """
    family = family_of(language)
    return DecoderConfig(
        kept=kept_of_layers(language, parallel, lora, engine=engine),
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=num_kv_heads(language),
        kv_channels=head_width(language),
        layernorm_epsilon=language.norm_epsilon,
        qk_layernorm=language.qk_norm,
        softmax_scale=score_factor(language),
        add_bias_linear=family.has_linear_biases,
        add_qkv_bias=language.qkv_bias,
        activation_func=ACTIVATIONS[family.activation],
        gated_linear_unit=True,
        normalization="RMSNorm",
        calculate_per_token_loss=True,
        apply_rope_fusion=speed.rope_fusion,
        gradient_accumulation_fusion=speed.gradient_accumulation_fusion,
        cross_entropy_loss_fusion=speed.cross_entropy_fusion,
        cross_entropy_fusion_impl="native",
        cuda_graph_impl="transformer_engine" if speed.cuda_graphs else "none",
        tp_comm_overlap=speed.tp_overlap,
        **_layout(language, parallel, speed),
        **_activation(language, speed, engine=engine),
        **_recomputation(language, parallel, engine=engine),
        **expert_settings(language, parallel, engine=engine),
        **fp8_settings(precision, fp8_scaling),
        **_common(precision),
    )


def _layout(language: LanguageConfig, parallel: ParallelConfig, speed: Speed) -> dict[str, object]:
    """Megatron's settings of how layers lie over ranks, and of the exchange between stages."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "pipeline_model_parallel_layout": _uneven_layout(language, parallel),
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence_parallel,
        # gloo reads a tensor after the call that sends it, so an overlapped send must find it where it was.
        "deallocate_pipeline_outputs": parallel.pipeline > 1 and (has_gpu() or not speed.overlap_p2p),
        "overlap_p2p_comm": speed.overlap_p2p,
        "batch_p2p_comm": has_gpu() and not speed.overlap_p2p,
        "batch_p2p_sync": speed.synchronize_p2p,
    }


def _activation(language: LanguageConfig, speed: Speed, *, engine: bool) -> dict[str, object]:
    """Megatron's settings of who applies a gated SiLU: its own fused kernel, or `gated.GatedSilu` of the MLP's spec.

    Megatron's fused GELU is the approximation with tanh, so only SiLU is left to it. Its name of a spec's activation
    is another package's. Experts would take that too, but their specs have none.
    """
    silu = family_of(language).activation is Activation.SILU
    return {
        "bias_activation_fusion": silu and speed.activation_fusion,
        "use_te_activation_func": silu and not (engine or speed.activation_fusion or expert_layers(language)),
    }


def kept_of_layers(language: LanguageConfig, parallel: ParallelConfig, lora: LoraConfig, *, engine: bool) -> Kept:
    """Say what is kept of decoder layers, as far as that is not Megatron's to decide.

    Args:
        language: The decoder.
        parallel: The layout, whose recomputation and offloading count.
        lora: Adapters of the decoder.
        engine: Whether the layers are Transformer Engine's.

    Returns:
        The settings.

    Raises:
        ConfigError: Norms are to be computed again, and no layer has a norm apart from a linear.
    """
    again = RecomputeModule.LAYER_NORM in recomputed_modules(parallel)
    if again and engine and not lora.rank and not expert_layers(language):
        raise ConfigError(
            [
                "parallel.recompute_modules: layernorm finds no norm to compute again: Transformer Engine's layers, "
                "which run here, compute norm and linear in one; leave it out, or use model.layers=local"
            ]
        )
    return Kept(
        norms_again=again,
        offloaded_layers=parallel.offload_layers,
        offload_above_bytes=int(parallel.offload_above_mib * 2**20),
    )


def _recomputation(language: LanguageConfig, parallel: ParallelConfig, *, engine: bool) -> dict[str, object]:
    """Megatron's settings; where it names parts of a layer, experts are the MLP of the layers that have them."""
    full, wanted = parallel.recompute is Recompute.FULL, recomputed_modules(parallel)
    require_expert_activation(wanted, engine=engine)
    names = [module.value for module in wanted if module is not RecomputeModule.LAYER_NORM]
    if RecomputeModule.MLP in wanted and expert_layers(language):
        names = [name for name in (*names, "moe") if name != RecomputeModule.EXPERT_ACTIVATION]
    granularity = parallel.recompute.value if full or names else None
    return {
        "recompute_granularity": granularity,
        "recompute_method": parallel.recompute_method.value if full else None,
        "recompute_num_layers": parallel.recompute_num_layers if full else None,
        "recompute_modules": names,
    }


def without_gradient_accumulation(config: TransformerConfig) -> TransformerConfig:
    """The same for Megatron's own linears, which could accumulate gradients only with Apex.

    Args:
        config: The decoder's config, which is not changed.

    Returns:
        A copy; it shares everything else.
    """
    own = copy.copy(config)
    own.gradient_accumulation_fusion = False
    return own


@dataclass
class TowerConfig(TransformerConfig):
    """Megatron's config of a vision tower, and how its layers are built; see `specs.vit_layer`."""

    engine_layers: bool = False
    """Whether they are Transformer Engine's."""
    fused_activation: Activation | None = None
    """The activation, if the MLP's first linear may apply it; `activation_func` is the same activation alone."""
    adapters: LoraConfig = NO_ADAPTERS
    """Adapters of its layers: `targets` are the recipe's `lora.vision_targets`, and the rank is 0 if there are none."""

    def for_layers(self) -> TransformerConfig:
        """The config for layers whose first linear applies the activation, which the MLP then must not; or this one."""
        if self.fused_activation is None:
            return self
        own = copy.copy(self)
        own.activation_func = identity
        return own


def vision_config(
    vision: VisionConfig, precision: Precision, speed: Speed = PLAIN, lora: LoraConfig = NO_ADAPTERS
) -> TowerConfig:
    """Megatron's config of the tower: not parallel, since every rank holds all of it.

    Args:
        vision: The tower.
        precision: Of its parameters; under `fp8` it stays bf16.
        speed: Which fusions are used.
        lora: The recipe's adapters.

    Returns:
        The config.
    """
    adapters = replace(lora, targets=lora.vision_targets) if lora.vision_targets else NO_ADAPTERS
    return TowerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=ACTIVATIONS[vision.activation],
        engine_layers=speed.vision_engine,
        fused_activation=vision.activation if speed.activation_fusion else None,
        adapters=adapters,
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
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        _GRAPHED_PARTS: [],
    }


def _uneven_layout(language: LanguageConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's explicit layout where the recipe names the layers of each stage; also allows a stage without any."""
    if parallel.layers_per_stage is None or parallel.pipeline == 1:
        return None
    rows = [["decoder"] * count for count in layers_per_chunk(language.num_layers, parallel)]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows
