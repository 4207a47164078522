"""Tiny models of transformers with weights that leave nothing at its default, as cases for `check_case`.

Weights are drawn in float32 and transformers computes with them in float64 (its RMSNorms in float32 all the same), so
an error measured here is mostly ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig

from megatron_deepstack.config.choices import Activation, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.convert.hf_names import to_published
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle.model import OracleSample
from megatron_deepstack.testing.published.reference_case import ReferenceCase

SIGLIP = VisionConfig(
    image_size=18,  # 4 whole patches of 4 and 2 pixels more, as 384 is 27 patches of 14 and 6 pixels
    patch_size=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_layers=3,
    num_heads=2,
    activation=Activation.GELU_TANH,
    kind="siglip",
    layernorm_epsilon=1e-6,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
CLIP = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=40, num_layers=3, num_heads=2)


def hf_tower(vision: VisionConfig) -> CLIPVisionConfig | SiglipVisionConfig:
    """transformers' config of a tower."""
    kind = CLIPVisionConfig if vision.kind == "clip" else SiglipVisionConfig
    return kind(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu" if vision.kind == "clip" else "gelu_pytorch_tanh",
        layer_norm_eps=vision.layernorm_epsilon,
        attn_implementation="sdpa",
    )


def llava_model(language: LanguageConfig, vision: VisionConfig = CLIP) -> ModelConfig:
    """LLaVA: one view per image, no stacks."""
    return ModelConfig(variant=Variant.LLAVA, vision=vision, language=language, stacks=StackConfig())


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Norms around 1, everything else normal, biases included; float32 values in float64 parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.split(".")[-2] and name.endswith("weight")
            scale = 0.3 if is_norm or parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_((drawn * scale + float(is_norm)).double())


def published_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """float32 parameters under published names."""
    named = ((to_published(name), value) for name, value in module.named_parameters())
    return {name: value.detach().float() for name, value in named if name is not None}


def published_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under published names, of the parameters that have one."""
    named = ((to_published(name), value.grad) for name, value in module.named_parameters())
    return {name: grad.float() for name, grad in named if name is not None and grad is not None}


def draw_samples(
    language: LanguageConfig, images: Sequence[int], vision: VisionConfig = CLIP, seed: int = 1
) -> list[OracleSample]:
    """One sample per entry of `images`, with none or one image in its text; about half the tokens are targets."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for num_images in images:
        tokens = torch.randint(1, language.vocab_size, (11 + 3 * len(samples),), generator=generator)
        labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.5, tokens, IGNORE_INDEX)
        if not num_images:
            samples.append(OracleSample(tokens=tokens, labels=labels))
            continue
        tokens[4], labels[4] = IMAGE_TOKEN_ID, IGNORE_INDEX
        pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
        samples.append(OracleSample(tokens=tokens, labels=labels, pixel_values=pixels, grids=((1, 1),)))
    return samples


def make_case(
    name: str,
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    module: PreTrainedModel,
    samples: Sequence[OracleSample],
    results: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> ReferenceCase:
    """A case of `module`'s `results`, logits (T, V) and expanded labels (T,) by sample; runs its backward."""
    total = sum(
        F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        for logits, labels in results
    )
    loss = total / sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in results)
    loss.backward()
    return ReferenceCase(
        name=name,
        model=model,
        weights=weights,
        grads=published_gradients(module),
        samples=tuple(samples),
        logits=tuple(logits.detach().float() for logits, _ in results),
        loss=loss.item(),
        attention_mask=torch.empty(0),
        max_tokens=None,
    )


def spare_encoder_weights(language: LanguageConfig) -> dict[str, torch.Tensor]:
    """Weights of a vision tower and projector that text-only samples never touch."""
    tower = CLIPVisionModel(hf_tower(CLIP))
    randomise(tower)
    width, hidden = CLIP.hidden_size, language.hidden_size
    shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    projector = {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    return {**published_weights(tower), **projector}


def no_gradients(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros for what ours has of an encoder: LLaVA's features are those before CLIP's last layer."""
    unused = (f".encoder.layers.{CLIP.num_layers - 1}.", ".post_layernorm.")
    return {name: torch.zeros_like(value) for name, value in encoder.items() if not any(u in name for u in unused)}
