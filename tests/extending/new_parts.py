"""A vision tower and a decoder family that the package does not know, added from outside by a row each.

The tower is transformers' ViT: a class token *and* a patch bias, no norm after the embedding, other names for all its
tensors. The family is a LLaMA whose linears all have biases and whose gate is a GELU, as `LlamaConfig` can say.
"""

from __future__ import annotations

from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.traits.families import FamilyTraits, HfDecoder, llama_fields, register_family
from megatron_deepstack.config.traits.hf_fields import IGNORED, fixed, read
from megatron_deepstack.config.traits.towers import SIZE_FIELDS, HfTensor, HfTower, TowerTraits, register_tower

VIT = TowerTraits(
    has_class_token=True,
    has_patch_bias=True,
    has_pre_norm=False,
    activations=(Activation.GELU,),
    hugging_face=HfTower(
        model_types=("vit",),
        image_processor="ViTImageProcessor",
        fields={
            **SIZE_FIELDS,
            "num_attention_heads": read("num_heads", default=12),
            "hidden_act": read("activation", default="gelu"),
            "layer_norm_eps": read("layernorm_epsilon", default=1e-12),
            "qkv_bias": fixed(True),
            "hidden_dropout_prob": fixed(0.0),
            "attention_probs_dropout_prob": fixed(0.0),
            "encoder_stride": IGNORED,
            "pooler_act": IGNORED,
            "pooler_output_size": IGNORED,
        },
        tensors={
            "embeddings.class_embedding": HfTensor(name="embeddings.cls_token", leading_ones=2),
            "embeddings.position_embedding.weight": HfTensor(name="embeddings.position_embeddings", leading_ones=1),
            "embeddings.patch_embedding.": HfTensor(name="embeddings.patch_embeddings.projection."),
            **{
                f"encoder.layers.{{n}}.{ours}.": HfTensor(name=f"encoder.layer.{{n}}.{theirs}.")
                for ours, theirs in {
                    "layer_norm1": "layernorm_before",
                    "layer_norm2": "layernorm_after",
                    "self_attn.q_proj": "attention.attention.query",
                    "self_attn.k_proj": "attention.attention.key",
                    "self_attn.v_proj": "attention.attention.value",
                    "self_attn.out_proj": "attention.output.dense",
                    "mlp.fc1": "intermediate.dense",
                    "mlp.fc2": "output.dense",
                }.items()
            },
            "post_layernorm.": HfTensor(name="layernorm."),
        },
    ),
)

BIASED = FamilyTraits(
    switches={"qkv_bias": True, "qk_norm": False},
    activation=Activation.GELU_TANH,
    has_linear_biases=True,
    hugging_face=HfDecoder(
        model_types=("llama",),
        fields=llama_fields(
            attention_bias=fixed(True, default=False, written=True), mlp_bias=fixed(True, default=False, written=True)
        ),
    ),
)


def register(rank: int = 0) -> None:
    """Make both known to this process; every rank does so."""
    register_tower("vit", VIT)
    register_family("biased_llama", BIASED)
