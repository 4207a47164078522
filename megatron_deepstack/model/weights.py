"""How our parameters correspond to the published checkpoint's tensors.

There is a `rules.Rule` for each parameter: which published tensors (name and shape) it is made of, and how it is split.
Initialisation, loading, export and comparison with reference data all go through these rules, so that a layout cannot
change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_deepstack.config.choices import LoraTarget
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ModelConfig
from megatron_deepstack.config.sizes import expert_layers, head_width, num_kv_heads
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.model.expert_weights import expert_rules, own_experts
from megatron_deepstack.model.language import LanguageChunk
from megatron_deepstack.model.layers.lora import WithAdapter
from megatron_deepstack.model.qformer_weights import qformer_rules
from megatron_deepstack.model.rules import Rule, Rules, Shape
from megatron_deepstack.model.vision.encoder import VisualEncoder
from megatron_deepstack.model.vision.qformer import QFormers
from megatron_deepstack.planning.budget.linears import linear_sizes

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
LAYERS_PREFIX = "model.layers."


def decoder_rules(chunk: LanguageChunk, model: ModelConfig, lora: LoraConfig | None = None) -> Rules:
    """What a decoder chunk's parameters are made of.

    Args:
        chunk: The chunk.
        model: The recipe's model.
        lora: Its adapters, whose rules are then given too.

    Returns:
        Rules by the parameter's name in the chunk.
    """
    language = model.language
    vocabulary = (language.vocab_size, language.hidden_size)
    known = {
        "embedding.word_embeddings.weight": _vocabulary("model.embed_tokens.weight", vocabulary, chunk),
        "output_layer.weight": _vocabulary(
            "model.embed_tokens.weight" if language.tied_embeddings else "lm_head.weight", vocabulary, chunk
        ),
        "decoder.final_layernorm.weight": _plain("model.norm.weight", (language.hidden_size,)),
    }
    for local, layer in enumerate(range(chunk.chunk.first, chunk.chunk.stop)):
        prefix = f"{LAYERS_PREFIX}{layer}."
        rules = decoder_layer_rules(prefix, model)
        if layer in expert_layers(language):
            rules = rules | expert_rules(prefix, language, own_experts(chunk))
        if lora is not None and lora.rank:
            rules = rules | adapter_rules(prefix, model.language, lora)
        known.update({f"decoder.layers.{local}.{name}": rule for name, rule in rules.items()})
    return _select(chunk, known)


def decoder_layer_rules(prefix: str, model: ModelConfig) -> Rules:
    """What the parameters of a decoder's layer are made of.

    Args:
        prefix: What the published names of the layer's tensors begin with, such as `model.layers.7.`.
        model: The recipe's model.

    Returns:
        Rules by the parameter's name in the layer, of all parameters that some family or implementation has.
    """
    language = model.language
    h, f = language.hidden_size, language.ffn_hidden_size
    d, groups = head_width(language), num_kv_heads(language)
    q, kv = language.num_heads * d, groups * d
    attention = [f"{prefix}self_attn.{x}_proj" for x in "qkv"]
    input_norm = _plain(f"{prefix}input_layernorm.weight", (h,))
    mlp_norm = _plain(f"{prefix}post_attention_layernorm.weight", (h,))
    return {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.layer_norm_weight": input_norm,
        "self_attention.linear_qkv.weight": _fused(attention, "weight", [(q, h), (kv, h), (kv, h)], groups, tp_dim=0),
        "self_attention.linear_qkv.bias": _fused(attention, "bias", [(q,), (kv,), (kv,)], groups, tp_dim=0),
        "self_attention.q_layernorm.weight": _plain(f"{prefix}self_attn.q_norm.weight", (d,)),
        "self_attention.k_layernorm.weight": _plain(f"{prefix}self_attn.k_norm.weight", (d,)),
        "self_attention.linear_proj.weight": _plain(f"{prefix}self_attn.o_proj.weight", (h, q), tp_dim=1),
        "self_attention.linear_proj.bias": _plain(f"{prefix}self_attn.o_proj.bias", (h,)),
        "pre_mlp_layernorm.weight": mlp_norm,
        "mlp.linear_fc1.layer_norm_weight": mlp_norm,
        "mlp.linear_fc1.weight": _gate_and_up(prefix, "weight", (f, h)),
        "mlp.linear_fc1.bias": _gate_and_up(prefix, "bias", (f,)),
        "mlp.linear_fc2.weight": _plain(f"{prefix}mlp.down_proj.weight", (h, f), tp_dim=1),
        "mlp.linear_fc2.bias": _plain(f"{prefix}mlp.down_proj.bias", (h,)),
    }


def _gate_and_up(prefix: str, kind: str, shape: Shape) -> Rule:
    names = (f"{prefix}mlp.gate_proj.{kind}", f"{prefix}mlp.up_proj.{kind}")
    return Rule(names=names, shapes=(shape, shape), tp_dim=0, concatenated=True)


def decoder_layer_names(model: ModelConfig) -> frozenset[str]:
    """Published names of the tensors that the decoder's layers are made of, without adapters."""
    language = model.language
    absent = set() if language.qkv_bias else {"self_attention.linear_qkv.bias"}
    if not family_of(language).has_linear_biases:
        absent |= {"self_attention.linear_proj.bias", "mlp.linear_fc1.bias", "mlp.linear_fc2.bias"}
    if not language.qk_norm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    found: set[str] = set()
    for layer in range(language.num_layers):
        rules = whole_layer_rules(model, layer)
        found |= {name for ours, rule in rules.items() if ours not in absent for name in rule.names}
    return frozenset(found)


def whole_layer_rules(model: ModelConfig, layer: int) -> Rules:
    """What the parameters of one layer of the whole decoder are made of, with all of its experts.

    Args:
        model: The recipe's model.
        layer: Number of the layer, counted from 0.

    Returns:
        Rules by the parameter's name in the layer, of all parameters that some family or implementation has.
    """
    prefix, language = f"{LAYERS_PREFIX}{layer}.", model.language
    rules = decoder_layer_rules(prefix, model)
    if layer not in expert_layers(language):
        return rules
    others = {ours: rule for ours, rule in rules.items() if not ours.startswith("mlp.linear_fc")}
    return others | expert_rules(prefix, language, range(language.num_experts))


_ADAPTED = {
    "self_attention.linear_qkv.": LoraTarget.QKV,
    "self_attention.linear_proj.": LoraTarget.ATTENTION_OUTPUT,
    "mlp.linear_fc1.": LoraTarget.MLP_IN,
    "mlp.linear_fc2.": LoraTarget.MLP_OUT,
}
"""Linears of a layer that may have adapters."""


def adapter_rules(prefix: str, language: LanguageConfig, lora: LoraConfig) -> Rules:
    """What the parameters of the adapters of a decoder's layer are made of, by their names in it.

    There is an A for each fused linear and a B for each published one. Their names are those of other programs, if
    these have the same matrix.

    Args:
        prefix: What published names of the layer begin with.
        language: The recipe's decoder.
        lora: Rank of the adapters, and the linears that have one.

    Returns:
        Rules by the parameter's name in the layer.
    """
    rank, groups = lora.rank, num_kv_heads(language)
    f, h = language.ffn_hidden_size, language.hidden_size
    sizes = linear_sizes(language)
    width, fused = sizes[LoraTarget.ATTENTION_OUTPUT][0], sizes[LoraTarget.QKV][1]
    kv = (fused - width) // 2
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv = [f"{attention}{x}_proj" for x in "qkv"]
    rules = {
        "self_attention.linear_qkv.lora_a": _plain(f"{attention}qkv_proj.lora_A.weight", (rank, h)),
        "self_attention.linear_qkv.lora_b": _fused(
            qkv, "lora_B.weight", [(width, rank), (kv, rank), (kv, rank)], groups, tp_dim=0
        ),
        "self_attention.linear_proj.lora_a": _plain(f"{attention}o_proj.lora_A.weight", (rank, width), tp_dim=1),
        "self_attention.linear_proj.lora_b": _plain(f"{attention}o_proj.lora_B.weight", (h, rank)),
        "mlp.linear_fc1.lora_a": _plain(f"{mlp}gate_up_proj.lora_A.weight", (rank, h)),
        "mlp.linear_fc1.lora_b_gate": _plain(f"{mlp}gate_proj.lora_B.weight", (f, rank), tp_dim=0),
        "mlp.linear_fc1.lora_b_up": _plain(f"{mlp}up_proj.lora_B.weight", (f, rank), tp_dim=0),
        "mlp.linear_fc2.lora_a": _plain(f"{mlp}down_proj.lora_A.weight", (rank, f), tp_dim=1),
        "mlp.linear_fc2.lora_b": _plain(f"{mlp}down_proj.lora_B.weight", (h, rank)),
    }
    return {
        name: rule
        for name, rule in rules.items()
        if any(name.startswith(linear) for linear, target in _ADAPTED.items() if target in lora.targets)
    }


def encoder_rules(encoder: VisualEncoder, model: ModelConfig) -> Rules:
    """What the encoder's parameters are made of, also of its adapters; nothing is split.

    Args:
        encoder: The encoder.
        model: The recipe's model.

    Returns:
        Rules by the parameter's name in the encoder.
    """
    known = native_encoder_rules(model) if tower_of(model.vision).is_native else _fixed_encoder(encoder, model)
    for name, module in encoder.named_modules():
        if isinstance(module, WithAdapter):
            known.update(_beside(f"{name}.", known[f"{name}.weight"], module.lora.rank))
    return _select(encoder, known)


def _beside(name: str, weight: Rule, rank: int) -> Rules:
    """Rules of the adapter beside a linear that is not split: B is fused as the weight is, and there is one A."""
    modules = [one.removesuffix(".weight") for one in weight.names]
    fused = modules[0] if len(modules) == 1 else f"{modules[0].rpartition('.')[0]}.qkv_proj"
    outputs = [shape[0] for shape in weight.shapes]
    return {
        f"{name}lora_a": _plain(f"{fused}.lora_A.weight", (rank, weight.shapes[0][1])),
        f"{name}lora_b": replace(
            weight,
            names=tuple(f"{one}.lora_B.weight" for one in modules),
            shapes=tuple((rows, rank) for rows in outputs),
        ),
    }


def _fixed_encoder(encoder: VisualEncoder, model: ModelConfig) -> Rules:
    """Rules of a tower for views of one size, its projector and the newline."""
    vision, hidden = model.vision, model.language.hidden_size
    c, p = vision.hidden_size, vision.patch_size
    embeddings = f"{VISION_PREFIX}embeddings."
    known = {
        "vit.patch_embedding.weight": _plain(f"{embeddings}patch_embedding.weight", (c, 3, p, p)),
        "vit.patch_embedding.bias": _plain(f"{embeddings}patch_embedding.bias", (c,)),
        "vit.class_embedding": _plain(f"{embeddings}class_embedding", (c,)),
        "vit.position_embedding": _plain(
            f"{embeddings}position_embedding.weight", tuple(encoder.vit.position_embedding.shape)
        ),
        "vit.pre_norm.weight": _plain(f"{VISION_PREFIX}pre_layrnorm.weight", (c,)),
        "vit.pre_norm.bias": _plain(f"{VISION_PREFIX}pre_layrnorm.bias", (c,)),
        "vit.post_norm.weight": _plain(f"{VISION_PREFIX}post_layernorm.weight", (c,)),
        "vit.post_norm.bias": _plain(f"{VISION_PREFIX}post_layernorm.bias", (c,)),
        "projector.fc1.weight": _plain(f"{PROJECTOR_PREFIX}0.weight", (hidden, c)),
        "projector.fc1.bias": _plain(f"{PROJECTOR_PREFIX}0.bias", (hidden,)),
        "projector.fc2.weight": _plain(f"{PROJECTOR_PREFIX}2.weight", (hidden, hidden)),
        "projector.fc2.bias": _plain(f"{PROJECTOR_PREFIX}2.bias", (hidden,)),
        "newline": _plain("model.image_newline", (hidden,)),
    }
    if isinstance(encoder.projector, QFormers):
        known = {name: rule for name, rule in known.items() if not name.startswith("projector.")}
        known.update(qformer_rules(encoder.projector, model, PROJECTOR_PREFIX))
    for layer in range(vision.num_layers):
        for name, rule in vit_layer_rules(f"{VISION_PREFIX}encoder.layers.{layer}.", model).items():
            known[f"vit.decoder.layers.{layer}.{name}"] = rule
    return known


def vit_layer_rules(prefix: str, model: ModelConfig) -> Rules:
    """What the parameters of a tower's layer are made of.

    Args:
        prefix: What the published names of the layer's tensors begin with.
        model: The recipe's model.

    Returns:
        Rules by the parameter's name in the layer; nothing is split.
    """
    c, f, heads = model.vision.hidden_size, model.vision.ffn_hidden_size, model.vision.num_heads
    attention = [f"{prefix}self_attn.{x}_proj" for x in "qkv"]
    rules = {
        "self_attention.linear_qkv.weight": _fused(attention, "weight", [(c, c)] * 3, heads),
        "self_attention.linear_qkv.bias": _fused(attention, "bias", [(c,)] * 3, heads),
        "self_attention.linear_proj.weight": _plain(f"{prefix}self_attn.out_proj.weight", (c, c)),
        "self_attention.linear_proj.bias": _plain(f"{prefix}self_attn.out_proj.bias", (c,)),
        "mlp.linear_fc1.weight": _plain(f"{prefix}mlp.fc1.weight", (f, c)),
        "mlp.linear_fc1.bias": _plain(f"{prefix}mlp.fc1.bias", (f,)),
        "mlp.linear_fc2.weight": _plain(f"{prefix}mlp.fc2.weight", (c, f)),
        "mlp.linear_fc2.bias": _plain(f"{prefix}mlp.fc2.bias", (c,)),
    }
    for kind in ("weight", "bias"):
        rules[f"input_layernorm.{kind}"] = _plain(f"{prefix}layer_norm1.{kind}", (c,))
        rules[f"pre_mlp_layernorm.{kind}"] = _plain(f"{prefix}layer_norm2.{kind}", (c,))
    return rules


def native_encoder_rules(model: ModelConfig) -> Rules:
    """What the parameters of a tower for views of any size and its mergers are made of, under Qwen3-VL's names.

    Args:
        model: The recipe's model.

    Returns:
        Rules by the parameter's name in the encoder.
    """
    vision, hidden = model.vision, model.language.hidden_size
    c, f, p = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    block = c * vision.merge_size**2
    shapes: dict[str, dict[str, Shape]] = {
        "vit.patch_embedding": {"weight": (c, 3, vision.temporal_patch_size, p, p), "bias": (c,)}
    }
    names = {"vit.patch_embedding": f"{VISION_PREFIX}patch_embed.proj"}
    for layer in range(vision.num_layers):
        ours, theirs = f"vit.decoder.layers.{layer}.", f"{VISION_PREFIX}blocks.{layer}."
        for own, (published, rows, columns) in {
            "input_layernorm": ("norm1", c, None),
            "pre_mlp_layernorm": ("norm2", c, None),
            "self_attention.linear_proj": ("attn.proj", c, c),
            "mlp.linear_fc1": ("mlp.linear_fc1", f, c),
            "mlp.linear_fc2": ("mlp.linear_fc2", c, f),
        }.items():
            names[ours + own] = theirs + published
            shapes[ours + own] = {"weight": (rows,) if columns is None else (rows, columns), "bias": (rows,)}
    mergers = {"projector.base": (f"{PROJECTOR_PREFIX}merger", c)}
    for k in range(len(vision.taps)):
        mergers[f"projector.taps.{k}"] = (f"{PROJECTOR_PREFIX}deepstack_merger_list.{k}", block)
    for ours, (theirs, norm) in mergers.items():
        own_shapes: dict[str, Shape] = {"norm": (norm,), "fc1": (block, block), "fc2": (hidden, block)}
        for own, shape in own_shapes.items():
            published = own if own == "norm" else f"linear_{own}"
            names[f"{ours}.{own}"] = f"{theirs}.{published}"
            shapes[f"{ours}.{own}"] = {"weight": shape, "bias": shape[:1]}
    rules = {
        f"{ours}.{kind}": _plain(f"{names[ours]}.{kind}", shape)
        for ours, kinds in shapes.items()
        for kind, shape in kinds.items()
    }
    rules["vit.position_embedding"] = _plain(f"{VISION_PREFIX}pos_embed.weight", (vision.num_positions or 0, c))
    for layer in range(vision.num_layers):
        for kind, shape in {"weight": (3 * c, c), "bias": (3 * c,)}.items():
            rules[f"vit.decoder.layers.{layer}.self_attention.linear_qkv.{kind}"] = Rule(
                names=(f"{VISION_PREFIX}blocks.{layer}.attn.qkv.{kind}",),
                shapes=(shape,),
                groups=vision.num_heads,
                stacked=3,
            )
    return rules


def _plain(name: str, shape: Shape, tp_dim: int | None = None) -> Rule:
    return Rule(names=(name,), shapes=(shape,), tp_dim=tp_dim)


def _fused(modules: Sequence[str], kind: str, shapes: Sequence[Shape], groups: int, tp_dim: int | None = None) -> Rule:
    return Rule(names=tuple(f"{m}.{kind}" for m in modules), shapes=tuple(shapes), groups=groups, tp_dim=tp_dim)


def _vocabulary(name: str, shape: Shape, chunk: LanguageChunk) -> Rule:
    return Rule(names=(name,), shapes=(shape,), tp_dim=0, padded_rows=chunk.padded_vocabulary)


def _select(module: torch.nn.Module, known: Rules) -> Rules:
    """The rules of the parameters that exist; a parameter without a rule is a mistake of ours."""
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in known]
    assert not missing, f"no rule for the parameters {missing}"
    return {name: known[name] for name in names}
