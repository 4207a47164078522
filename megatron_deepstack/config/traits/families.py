"""The decoder families, and what each of them computes.

All of them are LLaMA-type decoders: RMSNorm before attention and before a gated MLP, rotary positions over the whole
head, grouped queries. The switches of a recipe (`qkv_bias`, `qk_norm`, `tied_embeddings`) choose within that form. A
family is an entry of `FAMILIES`, which fixes some switches, may add biases or another activation, and says how Hugging
Face names it. A family of Hugging Face that differs from LLaMA only in the switches is recognised by them, so a recipe
need not name it.

`register_family` adds an entry from another program. A family with other rotary positions builds them in
`model.layers.rotary`. A family with multipliers or another norm needs a new trait here, and code in `model` that reads
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.problems import did_you_mean
from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.traits.hf_fields import IGNORED, HfField, fixed, read, shape
from megatron_deepstack.config.traits.installed import load_installed_parts
from megatron_deepstack.errors import ConfigError

SWITCHES: Final = ("qkv_bias", "qk_norm", "tied_embeddings")
"""Fields of `model.language` that a family may fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfDecoder:
    """How Hugging Face stores a decoder family."""

    model_types: tuple[str, ...]
    """`model_type` of its configs; exports write the first one."""
    fields: Mapping[str, HfField]
    """Keys of its config, except those of the rotary embedding and of attention windows."""
    has_window_switch: bool = False
    """True if `sliding_window` applies only where `use_sliding_window` is true; False if it always applies."""
    default_window: int | None = None
    """Value that transformers uses if `sliding_window` is absent."""
    default_theta: float = 10000.0
    """Base of rotary positions that transformers uses if the config names none."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face's name of a tensor by LLaMA's name, where they differ; `{n}` is the number of the layer."""
    other_keys: Mapping[str, str] = field(default_factory=dict)
    """Another name of a key by which transformers reads and writes it too, to the name in `fields`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyTraits:
    """What a decoder family computes."""

    switches: Mapping[str, bool] = field(default_factory=dict)
    """Values that `model.language.qkv_bias`, `qk_norm` or `tied_embeddings` must have; the others are free."""
    activation: Activation = Activation.SILU
    """Activation of the gate in its MLP."""
    has_linear_biases: bool = False
    """The output projection of attention and the linears of the MLP have biases."""
    has_axial_positions: bool = False
    """Positions have three axes (time, line, column), whose frequencies are interleaved within a head, as
    `model.language.mrope_section` divides them."""
    has_experts: bool = False
    """Layers may have experts, of which a router chooses some for each token."""
    has_multipliers: bool = False
    """Embeddings, attention scores, residual additions and logits have factors of their own."""
    is_recognised: bool = False
    """True if the family differs from LLaMA only in its switches. A recipe that names no family then gets this one if
    its switches fit."""
    hugging_face: HfDecoder | None = None
    """None if Hugging Face has no such decoder; its weights then have only the published names."""


def llama_fields(
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    heads: int = 32,
    layers: int = 32,
    **more: HfField,
) -> dict[str, HfField]:
    """Describe the keys of a LLaMA-type config. The arguments are transformers' defaults, which differ by family.

    Args:
        num_kv_heads: Default of `num_key_value_heads`; None means the number of heads.
        head_dim: Default of `head_dim`; None means the hidden size divided by the number of heads.
        heads: Default of `num_attention_heads`.
        layers: Default of `num_hidden_layers`.
        **more: Keys that this family adds, or to which it gives another meaning.

    Returns:
        The description of each key, by its name.
    """
    return {
        "vocab_size": shape("vocab_size"),
        "hidden_size": shape("hidden_size"),
        "intermediate_size": shape("ffn_hidden_size"),
        "num_hidden_layers": read("num_layers", default=layers),
        "num_attention_heads": read("num_heads", default=heads),
        "num_key_value_heads": read("num_kv_heads", default=num_kv_heads),
        "head_dim": read("head_dim", default=head_dim),
        "rms_norm_eps": read("norm_epsilon", default=1e-6),
        "tie_word_embeddings": read("tied_embeddings", default=False),
        "hidden_act": read("activation", default="silu"),
        "attention_bias": fixed(False),
        "mlp_bias": fixed(False),
        "attention_dropout": fixed(0.0),
        "pretraining_tp": fixed(1),
        **more,
    }


_LLAMA = FamilyTraits(
    switches={"qkv_bias": False, "qk_norm": False},
    is_recognised=True,
    hugging_face=HfDecoder(model_types=("llama",), fields=llama_fields()),
)
_MISTRAL = FamilyTraits(
    switches=_LLAMA.switches,
    is_recognised=True,
    hugging_face=HfDecoder(
        model_types=("mistral",),
        fields=llama_fields(num_kv_heads=8),
        default_window=4096,
    ),
)
_QWEN2 = FamilyTraits(
    switches={"qkv_bias": True, "qk_norm": False},
    is_recognised=True,
    hugging_face=HfDecoder(
        model_types=("qwen2",),
        fields=llama_fields(
            num_kv_heads=32,
            attention_bias=IGNORED,  # transformers' Qwen2 does not read it
            use_mrope=fixed(False),
        ),
        has_window_switch=True,
    ),
)
_QWEN3 = FamilyTraits(
    switches={"qkv_bias": False, "qk_norm": True},
    is_recognised=True,
    hugging_face=HfDecoder(
        model_types=("qwen3",), fields=llama_fields(num_kv_heads=32, head_dim=128), has_window_switch=True
    ),
)
_QWEN3_VL = FamilyTraits(
    switches=_QWEN3.switches,
    has_axial_positions=True,
    hugging_face=HfDecoder(
        model_types=("qwen3_vl_text",),
        fields=llama_fields(
            num_kv_heads=32,
            head_dim=128,
            vocab_size=read("vocab_size", default=151936),
            hidden_size=read("hidden_size", default=4096),
            intermediate_size=read("ffn_hidden_size", default=22016),
            tie_word_embeddings=IGNORED,  # the config of the whole model says it
        ),
        default_theta=500000.0,
    ),
)
_QWEN3_VL_MOE = FamilyTraits(
    switches=_QWEN3.switches,
    has_axial_positions=True,
    has_experts=True,
    hugging_face=HfDecoder(
        model_types=("qwen3_vl_moe_text",),
        fields=llama_fields(
            heads=16,
            layers=24,
            num_kv_heads=16,
            vocab_size=read("vocab_size", default=151936),
            hidden_size=read("hidden_size", default=2048),
            intermediate_size=read("ffn_hidden_size", default=5632),
            tie_word_embeddings=IGNORED,  # the config of the whole model says it
            num_experts=read("num_experts", default=60),
            num_experts_per_tok=read("num_active_experts", default=4),
            moe_intermediate_size=read("expert_ffn_hidden_size", default=1408),
            decoder_sparse_step=read("expert_interval", default=1),
            mlp_only_layers=read("dense_layers", default=[]),
            router_aux_loss_coef=read("balance_loss", default=0.001),
            norm_topk_prob=fixed(True, written=True),
            output_router_logits=IGNORED,
        ),
        default_theta=500000.0,
        other_keys={"num_local_experts": "num_experts"},
    ),
)
_GRANITE = FamilyTraits(
    switches=_LLAMA.switches,
    has_multipliers=True,
    hugging_face=HfDecoder(
        model_types=("granite4_vision_text",),
        fields=llama_fields(
            vocab_size=read("vocab_size", default=32000),
            hidden_size=read("hidden_size", default=4096),
            intermediate_size=read("ffn_hidden_size", default=11008),
            embedding_multiplier=read("embedding_multiplier", default=1.0),
            attention_multiplier=read("attention_multiplier", default=1.0),
            residual_multiplier=read("residual_multiplier", default=1.0),
            logits_scaling=read("logits_scaling", default=1.0),
            tie_word_embeddings=IGNORED,  # the config of the whole model says it
        ),
    ),
)
_OF_SWITCHES_ALONE = FamilyTraits()
"""A decoder whose switches fit no family of Hugging Face, such as one with both biases and norms."""

_families: dict[str, FamilyTraits] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL_MOE,
    "granite": _GRANITE,
}
FAMILIES: Final[Mapping[str, FamilyTraits]] = MappingProxyType(_families)
"""Families by the name that `model.language.family` gives. A recipe without a name gets the first that fits it."""


def register_family(name: str, traits: FamilyTraits) -> None:
    """Let recipes of this process say `model.language.family: NAME`. Call it on every rank, before a recipe is read.

    Args:
        name: The new name.
        traits: What the family computes.

    Raises:
        ConfigError: Another family has that name, or the traits contradict each other.
    """
    unknown = sorted(set(traits.switches) - set(SWITCHES))
    if unknown:
        raise ConfigError([f"family '{name}': found switches {unknown}, expected some of {', '.join(SWITCHES)}"])
    if traits.has_linear_biases and traits.switches.get("qkv_bias") is not True:
        text = "has_linear_biases comes with biases on query, key and value; add the switch qkv_bias: True"
        raise ConfigError([f"family '{name}': {text}"])
    if _families.get(name, traits) != traits:
        raise ConfigError([f"model.language.family: '{name}' is another family's name already; choose another"])
    _families[name] = traits


def family_of(language: LanguageConfig) -> FamilyTraits:
    """Return what the recipe's decoder computes.

    Raises:
        ConfigError: The recipe names a family that does not exist.
    """
    if language.family is None:
        fitting = (family for family in _families.values() if family.is_recognised and fits(language, family))
        return next(fitting, _OF_SWITCHES_ALONE)
    traits = find_family(language.family)
    if traits is None:
        raise ConfigError([f"model.language.family: {unknown_family(language.family)}"])
    return traits


def find_family(name: str) -> FamilyTraits | None:
    """Return the family of that name, also one that an installed package adds; None if there is none."""
    if name not in _families:
        load_installed_parts()
    return _families.get(name)


def fits(language: LanguageConfig, family: FamilyTraits) -> bool:
    """Whether a decoder has the switches of a family.

    Args:
        language: The decoder.
        family: The family.

    Returns:
        True if each switch that the family fixes has the family's value.
    """
    return all(getattr(language, name) is value for name, value in family.switches.items())


def unknown_family(name: str) -> str:
    """Return the message about a name that no family has."""
    return f"found '{name}', expected one of {', '.join(_families)}{did_you_mean(name, list(_families))}"
