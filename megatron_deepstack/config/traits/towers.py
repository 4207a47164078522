"""The kinds of vision tower, and what each of them is.

All are vision transformers of one form: patches, a learned position for each token, layers with a LayerNorm before
attention and before the MLP, biases everywhere. They differ in the rows of `TOWERS`. A tower of this form needs a row
here and a size in `config.architectures`, nothing else; `register_tower` adds a row from another program. A tower of
another form (views of different sizes, several taps) also needs a module of its own, see `model.vision.tower`.
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
    """The name of a tower's tensor at Hugging Face, where it is not the published one."""

    name: str
    """May hold `{n}`, the number of the layer."""
    leading_ones: int = 0
    """Dimensions of size 1 that it has there before ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTower:
    """How Hugging Face knows a kind of tower."""

    model_types: tuple[str, ...]
    """`model_type` of its configs; the first is written."""
    fields: Mapping[str, HfField]
    """Keys of its config."""
    image_processor: str
    """Class that prepares its views, written into an export."""
    tensors: Mapping[str, HfTensor] = field(default_factory=dict)
    """By published name within the tower, where Hugging Face has another name."""
    final_norm: bool = True
    """transformers' module ends in a norm `post_layernorm`, although no selected feature passes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerTraits:
    """What a kind of tower is."""

    has_class_token: bool
    """A learned token stands before the patches; it is dropped from the features."""
    has_patch_bias: bool
    """The embedding of patches has a bias."""
    has_pre_norm: bool
    """A LayerNorm stands between the embedding and the first layer."""
    has_post_norm: bool = False
    """The selected feature passes a LayerNorm, whichever layer it comes from."""
    activations: tuple[Activation, ...]
    """Activations that its MLP may have."""
    hugging_face: HfTower | None = None
    """None where Hugging Face has no such tower: it then has published names only."""

    @property
    def num_leading_tokens(self) -> int:
        """Tokens before the patches, which run through the layers and are no features."""
        return int(self.has_class_token)


SIZE_FIELDS: Mapping[str, HfField] = {
    "hidden_size": shape("hidden_size"),
    "intermediate_size": shape("ffn_hidden_size"),
    "num_hidden_layers": shape("num_layers"),
    "image_size": shape("image_size"),
    "patch_size": shape("patch_size"),
    "num_channels": fixed(3),
}
"""Keys that the configs of all towers have alike."""
_CLIP_FIELDS: Mapping[str, HfField] = {
    **SIZE_FIELDS,
    "num_attention_heads": read("num_heads", default=12),
    "hidden_act": read("activation", default="quick_gelu"),
    "layer_norm_eps": read("layernorm_epsilon", default=1e-5),
    "attention_dropout": fixed(0.0),
    "dropout": fixed(0.0),
    "tie_word_embeddings": IGNORED,
    "projection_dim": IGNORED,  # of CLIP's own head, which no feature passes
    "vocab_size": IGNORED,  # LLaVA's configs carry it here, where nothing reads it
}
_SIGLIP_FIELDS: Mapping[str, HfField] = {
    **SIZE_FIELDS,
    "num_attention_heads": read("num_heads", default=12),
    "hidden_act": read("activation", default="gelu_pytorch_tanh"),
    "layer_norm_eps": read("layernorm_epsilon", default=1e-6),
    "attention_dropout": fixed(0.0),
    "tie_word_embeddings": IGNORED,
    # the pooling head has tensors of its own, which no feature passes; an export has none
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
_towers: dict[str, TowerTraits] = {"clip": _CLIP, "siglip": _SIGLIP}
TOWERS: Final[Mapping[str, TowerTraits]] = MappingProxyType(_towers)
"""By the name that `model.vision.kind` gives."""


def register_tower(kind: str, traits: TowerTraits) -> None:
    """Let recipes of this process say `model.vision.kind: KIND`. Call it on every rank, before a recipe is read.

    Args:
        kind: The new name.
        traits: What it stands for.

    Raises:
        ConfigError: Another tower has that name.
    """
    if _towers.get(kind, traits) != traits:
        raise ConfigError([f"model.vision.kind: '{kind}' is another tower's name already; choose another"])
    _towers[kind] = traits


def tower_of(vision: VisionConfig) -> TowerTraits:
    """What the recipe's tower is.

    Raises:
        ConfigError: No tower has that name.
    """
    traits = find_tower(vision.kind)
    if traits is None:
        raise ConfigError([f"model.vision.kind: {unknown_tower(vision.kind)}"])
    return traits


def find_tower(kind: str) -> TowerTraits | None:
    """The row of that name, also one that an installed package adds; None if there is none."""
    if kind not in _towers:
        load_installed_parts()
    return _towers.get(kind)


def unknown_tower(kind: str) -> str:
    """What to say of a name that no tower has."""
    return f"found '{kind}', expected one of {', '.join(_towers)}{did_you_mean(kind, list(_towers))}"


def kind_of_class_token(class_token: bool) -> str:
    """The kind that `class_token`, the field of earlier releases, stood for."""
    return "clip" if class_token else "siglip"
