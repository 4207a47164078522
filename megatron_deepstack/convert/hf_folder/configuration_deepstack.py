"""Configuration of DeepStack models for transformers: what `config.json` says of tower, decoder and stacks.

DeepStack (arXiv 2406.04334) puts the tokens of high-resolution crops of an image on top of its global tokens: crops
become *stacks*, each as long as the image's *context* (its tokens in the sequence), and stack k is added to the hidden
states at the context's positions before layer `slots[k]`, counted from 0.

This file needs transformers only; it is copied beside the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig


class DeepStackVisionConfig(PretrainedConfig):
    """The vision tower, a vision transformer with a learned position for each token."""

    model_type = "deepstack_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 336,
        patch_size: int = 14,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        has_class_token: bool = True,
        has_patch_bias: bool = False,
        has_pre_norm: bool = True,
        has_post_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set the numbers of the tower.

        Args:
            image_size: Side of a view in pixels.
            patch_size: Side of a patch in pixels.
            hidden_size: Width of the hidden states.
            intermediate_size: Width of the MLPs.
            num_hidden_layers: Number of layers, with those after the one that gives the features.
            num_attention_heads: Number of heads.
            hidden_act: Activation of the MLPs, by transformers' name.
            layer_norm_eps: Epsilon of the norms.
            has_class_token: Whether a learned token stands before the patches; the features leave it out.
            has_patch_bias: Whether the embedding of patches has a bias.
            has_pre_norm: Whether there is a norm between embedding and first layer.
            has_post_norm: Whether the features pass a norm.
            **kwargs: What transformers adds.
        """
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.has_class_token = has_class_token
        self.has_patch_bias = has_patch_bias
        self.has_pre_norm = has_pre_norm
        self.has_post_norm = has_post_norm
        super().__init__(**kwargs)


class DeepStackConfig(PretrainedConfig):
    """A whole model: tower, projector, decoder, and where stacks come from and go to."""

    model_type = "deepstack"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": DeepStackVisionConfig}
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        variant: str = "deepstack_l",
        context: str = "global",
        stack_source: str = "crops",
        stacked_part: str = "decoder",
        sampler: str = "2d",
        slots: list[int] | None = None,
        vision_feature_layer: int = -2,
        projector_hidden_act: str = "gelu",
        image_token_index: int = 32000,
        num_text_tokens: int | None = None,
        stacks: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the parts of the model.

        Args:
            text_config: The decoder, of any family of transformers whose layers lie in `layers`.
            vision_config: The vision tower.
            variant: The model's name; nothing depends on it.
            context: What takes an image's place in the sequence: `global` (the tokens of the global view), `mosaic`
                (these, then the mosaic of the crops, each of its lines with the learned newline), or `sequence` (these,
                then the tokens of all stacks).
            stack_source: What stacks are sampled from: `crops`, `high_res` (2x2 crops of each view), or `nothing`.
            stacked_part: Whose layers `slots` counts: `decoder` or `vit`.
            sampler: How a mosaic is divided into stacks: `2d`, `1d` or `grid`.
            slots: The layer before which each stack is added, counted from 0.
            vision_feature_layer: Hidden state that gives the features; -2 is the input of the last layer.
            projector_hidden_act: Activation between the two linear layers of the projector.
            image_token_index: Id of the placeholder, which the processor repeats once per token of an image.
            num_text_tokens: Number of ids that stand for text; rows of the embedding from here on are placeholders and
                padding. All rows if None.
            stacks: Stacks as the recipe has them, by which the folder is read back. Of `num_stacks`, if it is there, an
                image's stacks from that number on are left out.
            **kwargs: What transformers adds, and `data` from the recipe, by which the folder is read back.
        """
        if not isinstance(text_config, PretrainedConfig):
            text_config = dict(text_config or {})
            text_config = AutoConfig.for_model(text_config.pop("model_type", "llama"), **text_config)
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = DeepStackVisionConfig(**(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.variant = variant
        self.context = context
        self.stack_source = stack_source
        self.stacked_part = stacked_part
        self.sampler = sampler
        self.slots = list(slots) if slots is not None else []
        self.vision_feature_layer = vision_feature_layer
        self.projector_hidden_act = projector_hidden_act
        self.image_token_index = image_token_index
        self.num_text_tokens = text_config.vocab_size if num_text_tokens is None else num_text_tokens
        self.stacks = stacks or {}
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)


try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:  # only `transformers serve` needs it
    pass
else:
    # `transformers serve` takes a class from `auto_map` only for kinds of models that are in this table
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(DeepStackConfig.model_type, "DeepStackForConditionalGeneration")
