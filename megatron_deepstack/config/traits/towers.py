"""The kinds of vision tower, and what each of them is.

All of them are vision transformers of one form: patches, a learned position for each token, layers with a LayerNorm
before attention and before the MLP, and biases in all linear layers. The entries of `TOWERS` hold their differences. A
new tower of this form needs only an entry here and a size in `config.architectures`; `register_tower` adds an entry
from another program. A tower of another form (views of different sizes, features of several layers) also needs its own
module, see `model.vision.tower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.problems import did_you_mean
from megatron_deepstack.config.schema import VisionConfig
from megatron_deepstack.config.traits.hf_fields import IGNORED, HfField, fixed, read, shape
from megatron_deepstack.config.traits.installed import load_installed_parts
from megatron_deepstack.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTensor:
    """The name of a tower's tensor in Hugging Face's files, where it differs from the published name."""

    name: str
    """The name there; `{n}` in it is the number of the layer."""
    leading_ones: int = 0
    """Number of dimensions of size 1 that the tensor has there in front of the dimensions that it has here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTower:
    """How Hugging Face stores a kind of tower."""

    model_types: tuple[str, ...]
    """`model_type` of its configs; exports write the first one."""
    fields: Mapping[str, HfField]
    """Keys of its config."""
    image_processor: str
    """Name of the class that prepares its views, which an export writes."""
    tensors: Mapping[str, HfTensor] = field(default_factory=dict)
    """Hugging Face's name of a tensor by the published name within the tower, where they differ."""
    final_norm: bool = True
    """True if transformers' module ends with a norm `post_layernorm`, although no selected feature passes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerTraits:
    """What a kind of tower is."""

    has_class_token: bool = False
    """Whether there is a learned token before the patches; it is removed from the features."""
    has_patch_bias: bool
    """The embedding of patches has a bias."""
    has_pre_norm: bool = False
    """Whether there is a LayerNorm between the embedding and the first layer."""
    has_post_norm: bool = False
    """The selected feature passes a LayerNorm, whichever layer it comes from."""
    is_native: bool = False
    """Views may have any size: positions are interpolated from a square table and rotate by line and column, and the
    rows come from mergers of neighbouring patches, one for the last layer and one for each tap."""
    activations: tuple[Activation, ...]
    """Activations that its MLP may have."""
    layernorm_epsilon: float | None = None
    """Epsilon of its LayerNorms, if the recipe has no choice."""
    hugging_face: HfTower | None = None
    """None if Hugging Face has no such tower; its weights then have only the published names."""

    @property
    def num_leading_tokens(self) -> int:
        """Number of tokens before the patches, which pass through the layers and are not part of the features."""
        return int(self.has_class_token)


SIZE_FIELDS: Mapping[str, HfField] = {
    "hidden_size": shape("hidden_size"),
    "intermediate_size": shape("ffn_hidden_size"),
    "num_hidden_layers": shape("num_layers"),
    "image_size": shape("image_size"),
    "patch_size": shape("patch_size"),
    "num_channels": fixed(3),
}
"""Keys that the configs of all towers have in common."""
_CLIP_FIELDS: Mapping[str, HfField] = {
    **SIZE_FIELDS,
    "num_attention_heads": read("num_heads", default=12),
    "hidden_act": read("activation", default="quick_gelu"),
    "layer_norm_eps": read("layernorm_epsilon", default=1e-5),
    "attention_dropout": fixed(0.0),
    "dropout": fixed(0.0),
    "tie_word_embeddings": IGNORED,
    "projection_dim": IGNORED,  # of CLIP's head, which no feature passes
    "vocab_size": IGNORED,  # LLaVA's configs have this key here, and nothing reads it
}
_SIGLIP_FIELDS: Mapping[str, HfField] = {
    **SIZE_FIELDS,
    "num_attention_heads": read("num_heads", default=12),
    "hidden_act": read("activation", default="gelu_pytorch_tanh"),
    "layer_norm_eps": read("layernorm_epsilon", default=1e-6),
    "attention_dropout": fixed(0.0),
    "tie_word_embeddings": IGNORED,
    # no feature passes the pooling head, and an export does not have its tensors
    "vision_use_head": HfField(fixed=(False, True), default=True, written=True),
}
_ANY_GELU = (Activation.QUICK_GELU, Activation.GELU, Activation.GELU_TANH)

_CLIP = TowerTraits(
    has_class_token=True,
    has_patch_bias=False,
    has_pre_norm=True,
    activations=_ANY_GELU,
    hugging_face=HfTower(model_types=("clip_vision_model",), fields=_CLIP_FIELDS, image_processor="CLIPImageProcessor"),
)
_SIGLIP = TowerTraits(
    has_class_token=False,
    has_patch_bias=True,
    has_pre_norm=False,
    activations=_ANY_GELU,
    hugging_face=HfTower(
        model_types=("siglip_vision_model",), fields=_SIGLIP_FIELDS, image_processor="SiglipImageProcessor"
    ),
)
_QWEN3_VL = TowerTraits(
    is_native=True,
    has_patch_bias=True,
    activations=(*_ANY_GELU, Activation.SILU),
    layernorm_epsilon=1e-6,
    hugging_face=HfTower(
        model_types=("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe_vision", "qwen3_vl_moe"),
        image_processor="Qwen2VLImageProcessorFast",
        final_norm=False,
        fields={
            "depth": read("num_layers", default=27),
            "hidden_size": read("hidden_size", default=1152),
            "hidden_act": read("activation", default="gelu_pytorch_tanh"),
            "intermediate_size": read("ffn_hidden_size", default=4304),
            "num_heads": read("num_heads", default=16),
            "in_channels": fixed(3, written=True),
            "patch_size": read("patch_size", default=16),
            "spatial_merge_size": read("merge_size", default=2),
            "temporal_patch_size": read("temporal_patch_size", default=2),
            "out_hidden_size": read("out_hidden_size", default=3584),  # the decoder's width
            "num_position_embeddings": read("num_positions", default=2304),
            "deepstack_visual_indexes": read("taps", default=[8, 16, 24]),
        },
    ),
)
_towers: dict[str, TowerTraits] = {"clip": _CLIP, "siglip": _SIGLIP, "qwen3_vl": _QWEN3_VL}
TOWERS: Final[Mapping[str, TowerTraits]] = MappingProxyType(_towers)
"""Towers by the name that `model.vision.kind` gives."""


def register_tower(kind: str, traits: TowerTraits) -> None:
    """Let recipes of this process say `model.vision.kind: KIND`. Call it on every rank, before a recipe is read.

    Args:
        kind: The new name.
        traits: What the tower is made of.

    Raises:
        ConfigError: Another tower has that name.
    """
    if _towers.get(kind, traits) != traits:
        raise ConfigError([f"model.vision.kind: '{kind}' is another tower's name already; choose another"])
    _towers[kind] = traits


def tower_of(vision: VisionConfig) -> TowerTraits:
    """Return what the recipe's tower is made of.

    Raises:
        ConfigError: No tower has that name.
    """
    traits = find_tower(vision.kind)
    if traits is None:
        raise ConfigError([f"model.vision.kind: {unknown_tower(vision.kind)}"])
    return traits


def find_tower(kind: str) -> TowerTraits | None:
    """Return the tower of that name, also one that an installed package adds; None if there is none."""
    if kind not in _towers:
        load_installed_parts()
    return _towers.get(kind)


def unknown_tower(kind: str) -> str:
    """Return the message about a name that no tower has."""
    return f"found '{kind}', expected one of {', '.join(_towers)}{did_you_mean(kind, list(_towers))}"


def kind_of_class_token(class_token: bool) -> str:
    """Return the kind of tower that `class_token`, a field of earlier releases, stood for."""
    return "clip" if class_token else "siglip"
