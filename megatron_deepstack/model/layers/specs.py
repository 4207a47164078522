"""Layer specs: which classes Megatron builds a decoder or ViT layer from.

These are Transformer Engine's layers if they can run, else Megatron's local layers with torch's fused attention. Layers
that own a slot are `InjectionLayer`s; everything else in them is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_deepstack.config.choices import Activation, Layers, LoraTarget
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.errors import ConfigError, SlotError
from megatron_deepstack.model.layers.activation import activated
from megatron_deepstack.model.layers.attention import FusedCoreAttention, frame_by_frame
from megatron_deepstack.model.layers.decoder_layer import ALL_KEPT, DecoderLayer, Keeping, Kept
from megatron_deepstack.model.layers.experts import balance_factor, expert_mlp
from megatron_deepstack.model.layers.gated import GatedSilu
from megatron_deepstack.model.layers.injection import InjectionLayer
from megatron_deepstack.model.layers.key_value_cache import with_cache
from megatron_deepstack.model.layers.lora import NO_ADAPTERS, adapted
from megatron_deepstack.model.layers.norm import Norm
from megatron_deepstack.model.layers.offload import ChunkOffload
from megatron_deepstack.model.layers.residual import scaled_addition
from megatron_deepstack.platform.compute.device import has_gpu
from megatron_deepstack.platform.compute.transformer_engine import engine_problem


def uses_transformer_engine(layers: Layers) -> bool:
    """Whether Transformer Engine's layers are built. Raises ConfigError if they are demanded and cannot run."""
    if layers is Layers.LOCAL:
        return False
    problem = engine_problem() if has_gpu() else "this process sees no GPU"
    if layers is Layers.TRANSFORMER_ENGINE and problem is not None:
        what = "transformer_engine needs a GPU and the package transformer_engine"
        raise ConfigError([f"model.layers: {what}: {problem}; use `auto` or `local`"])
    return problem is None


def decoder_block(
    language: LanguageConfig,
    layers: Layers,
    lora: LoraConfig,
    first: int,
    stop: int,
    slots: Sequence[int],
    kept: Kept = ALL_KEPT,
) -> TransformerBlockSubmodules:
    """Specs of a chunk's decoder layers.

    Args:
        language: The decoder.
        layers: Whose layers are built.
        lora: Adapters of the linears; none if its rank is 0.
        first: Global number of the chunk's first layer.
        stop: One past the number of its last.
        slots: The chunk's own slots, ascending; `stop` stands for the output of the decoder's last layer.
        kept: What is kept of the layers for the backward pass.

    Returns:
        What Megatron's TransformerBlock is built from.

    Raises:
        SlotError: A stack belongs after the last layer, and the chunk has no layer.
        ConfigError: As `uses_transformer_engine` does.
    """
    if stop in slots and first == stop:
        text = f"a stack is added to the output of layer {stop - 1}, and the stage of the head has no layer"
        raise SlotError([f"parallel.layers_per_stage: {text}; give that stage one"])
    engine = uses_transformer_engine(layers)
    submodules = (
        _engine_submodules(language, lora)
        if engine
        else _submodules(_LOCAL, AttnMaskType.causal, language.qk_norm, lora)
    )
    if language.residual_multiplier != 1.0:
        add = scaled_addition(language.residual_multiplier)
        submodules = replace(submodules, self_attn_bda=add, mlp_bda=add)
    with_experts = replace(submodules, **_experts(language, engine)) if expert_layers(language) else submodules
    parts = [with_experts if layer in expert_layers(language) else submodules for layer in range(first, stop)]
    keeping = _keeping(kept, stop - first)
    specs = [
        ModuleSpec(module=InjectionLayer, params=_places(layer, stop, slots) | {"keeping": one}, submodules=own)
        if any(place is not None for place in _places(layer, stop, slots).values())
        else ModuleSpec(module=DecoderLayer, params={"keeping": one}, submodules=own)
        for layer, own, one in zip(range(first, stop), parts, keeping, strict=True)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=_final_norm() if engine else Norm)


def _keeping(kept: Kept, num_layers: int) -> list[Keeping | None]:
    """What is kept of each layer of a chunk; None where Megatron's settings say it all."""
    if not kept.norms_again and not kept.offloaded_layers:
        return [None] * num_layers
    offload = None
    if kept.offloaded_layers:
        offload = ChunkOffload(num_layers, kept.offloaded_layers, kept.offload_above_bytes)
    return [Keeping(layer, kept.norms_again, offload) for layer in range(num_layers)]


def _experts(language: LanguageConfig, engine: bool) -> dict[str, object]:
    """What a layer with experts has in place of an MLP, and the norm before it, which no linear can have."""
    norm = _engine_classes().norm if engine else Norm
    return {"mlp": expert_mlp(balance_factor(language), engine=engine), "pre_mlp_layernorm": norm}


def _places(layer: int, stop: int, slots: Sequence[int]) -> dict[str, int | None]:
    """Which of the chunk's rows a layer adds, before it and, if it is the last of the decoder, after it."""
    after = slots.index(stop) if layer == stop - 1 and stop in slots else None
    return {"slot_index": slots.index(layer) if layer in slots else None, "after_index": after}


def vit_layer(
    *, engine: bool = False, activation: Activation | None = None, lora: LoraConfig = NO_ADAPTERS
) -> ModuleSpec:
    """Spec of a ViT layer: bidirectional attention, LayerNorm, biases.

    Args:
        engine: Whether Transformer Engine's layers are built; they have the same parameters under the same names.
        activation: Applied by the MLP's first linear, see `activation.activated`; None leaves it to the MLP.
        lora: Adapters, whose `targets` are the layer's linears; see `TowerConfig.adapters`.

    Returns:
        The spec.
    """
    return _vit_layer(_engine_classes() if engine else _LOCAL, activation, lora)


def framed_vit_layer(
    *, engine: bool = False, activation: Activation | None = None, lora: LoraConfig = NO_ADAPTERS
) -> ModuleSpec:
    """Spec of a ViT layer whose attention stays within each frame of a row, see `attention.Packs`.

    Args:
        engine: As for `vit_layer`. Its attention takes all frames in one call; the local one goes from frame to frame.
        activation: As for `vit_layer`.
        lora: As for `vit_layer`.

    Returns:
        The spec.
    """
    if not engine:
        return _vit_layer(_LOCAL, activation, lora)
    classes = _engine_classes()
    return _vit_layer(replace(classes, attention=frame_by_frame(classes.attention)), activation, lora)


def _vit_layer(classes: _Classes, activation: Activation | None, lora: LoraConfig) -> ModuleSpec:
    submodules = _submodules(classes, AttnMaskType.no_mask, False, lora, activation)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def respect_no_grad(block: TransformerBlock) -> None:
    """Keep a block's layers from switching gradients on inside `torch.no_grad()`, which costs a graph in inference."""
    for layer in block.layers:
        layer.bias_dropout_add_exec_handler = nullcontext


@dataclass(frozen=True, slots=True)
class _Classes:
    """What a layer is made of, of one implementation."""

    norm: type
    column: type
    row: type
    attention: type


_LOCAL = _Classes(norm=Norm, column=ColumnParallelLinear, row=RowParallelLinear, attention=FusedCoreAttention)


def _engine_classes() -> _Classes:
    from megatron.core.extensions import transformer_engine as engine

    return _Classes(
        norm=engine.TENorm,
        column=engine.TEColumnParallelLinear,
        row=engine.TERowParallelLinear,
        attention=engine.TEDotProductAttention,
    )


def _submodules(
    classes: _Classes, mask: AttnMaskType, qk_norm: bool, lora: LoraConfig, activation: Activation | None = None
) -> TransformerLayerSubmodules:
    head_norm = classes.norm if qk_norm else IdentityOp
    return TransformerLayerSubmodules(
        input_layernorm=classes.norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=adapted(classes.column, LoraTarget.QKV, lora),
                core_attention=classes.attention,
                linear_proj=adapted(classes.row, LoraTarget.ATTENTION_OUTPUT, lora),
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=classes.norm,
        mlp=_mlp(
            MLPSubmodules(
                linear_fc1=activated(adapted(classes.column, LoraTarget.MLP_IN, lora), activation),
                linear_fc2=adapted(classes.row, LoraTarget.MLP_OUT, lora),
                activation_func=GatedSilu,  # only where the config says `use_te_activation_func`
            )
        ),
        mlp_bda=get_bias_dropout_add,
    )


def _mlp(submodules: MLPSubmodules) -> object:
    """The MLP's place in a layer spec: a builder since megatron-core 0.17, a ModuleSpec before."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def _engine_submodules(language: LanguageConfig, lora: LoraConfig) -> TransformerLayerSubmodules:
    """Megatron's own, which fuse norm and linear; with adapters apart, since A wants what the linear sees."""
    if lora.rank:
        classes = _engine_classes()
        classes = replace(classes, attention=with_cache(classes.attention))
        return _submodules(classes, AttnMaskType.causal, language.qk_norm, lora)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    submodules = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=language.qk_norm).submodules
    attention = submodules.self_attention.submodules
    attention.core_attention = with_cache(attention.core_attention)
    return submodules


def _final_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # type: ignore[no-any-return]
