"""Reference cases: NAME.safetensors with NAME.json beside it, as a model configuration, samples and expected numbers.

The format is that of the published implementation's numbers: tiny random models with their weights, gradients, logits
and loss. Only what the file says is trusted; a setting this reader does not know is an error, since ignoring it would
compare different mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_deepstack.config.choices import Activation, GridRule, Sampler, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.testing.oracle.model import OracleSample, expand_labels

KNOWN_FLAGS = ("2xsample", "deepstack_vit", "lsvit_start_layer_N")
SLOT_FLAG = "lsvit_start_layer_"
FIRST_LAYER = "model.layers.0.self_attn."
Choice = TypeVar("Choice", bound=Enum)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceCase:
    """One case; tensors are float32 and int64 as stored."""

    name: str
    """Name of the case, which is the file's."""
    model: ModelConfig
    """The model the numbers were produced with."""
    weights: dict[str, Tensor] = field(repr=False)
    """Every parameter under its published checkpoint name."""
    grads: dict[str, Tensor] = field(repr=False)
    """Gradient of `loss` for each parameter that takes part; parameters without effect are absent."""
    samples: tuple[OracleSample, ...] = field(repr=False)
    """One per row, without its padding; a text-only row has no images, its dummy views are left out."""
    logits: tuple[Tensor, ...] = field(repr=False)
    """(T, vocabulary) of each sample, T its own expanded length."""
    loss: float
    """Mean loss over all targets of all samples."""
    attention_mask: Tensor = field(repr=False)
    """(rows, t) int64 as stored, before placeholders are expanded; 1 marks tokens, 0 the padding on the right."""
    max_tokens: int | None
    """Length that expanded samples were cut to, or None where no sample was cut."""


def load_case(path: str | Path) -> ReferenceCase:
    """Read a case.

    Args:
        path: NAME.safetensors, NAME.json or NAME; both files must be there.

    Raises:
        DataError: Either file is missing or damaged, or holds a setting that this reader does not know.
    """
    tensors_path = Path(path) if Path(path).suffix == ".safetensors" else Path(path).with_suffix(".safetensors")
    settings = _read_settings(tensors_path.with_suffix(".json"))
    tensors = _read_tensors(tensors_path)
    weights, grads = _under("weight.", tensors), _under("grad.", tensors)
    model = _model_config(settings, weights)
    samples = tuple(_sample(settings, tensors, row) for row in range(len(settings["grids"])))
    lengths = [len(expand_labels(model, sample)) for sample in samples]
    width = tensors["logits"].shape[1]
    return ReferenceCase(
        name=tensors_path.stem,
        model=model,
        weights=weights,
        grads=grads,
        samples=samples,
        logits=tuple(rows[:length] for rows, length in zip(tensors["logits"], lengths, strict=True)),
        loss=float(tensors["loss"]),
        attention_mask=tensors["attention_mask"],
        max_tokens=width if max(lengths) > width else None,
    )


class _Settings(dict[str, Any]):
    """JSON object whose missing keys name the file they are missing from."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__({k: _Settings(v, f"{where}: {k}") if isinstance(v, dict) else v for k, v in values.items()})
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise DataError(f"{self.where}: no key {key!r}; it has {', '.join(sorted(self))}")


def _read_settings(path: Path) -> _Settings:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the settings of a case lie beside its .safetensors file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object of settings, found {type(values).__name__}")
    return _Settings(values, str(path))


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; a case is NAME.safetensors with NAME.json beside it")
    try:
        return _Settings(load_file(path), str(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _model_config(settings: _Settings, weights: Mapping[str, Tensor]) -> ModelConfig:
    flags, start = _flags(settings)
    in_vit = "deepstack_vit" in flags
    if in_vit and start is None:
        raise DataError(f"{settings.where}: args {settings['args']!r} has deepstack_vit without {SLOT_FLAG}N")
    variant = Variant.DEEPSTACK_HD if settings["is_anyres"] else Variant.DEEPSTACK_L
    return ModelConfig(
        variant=Variant.DEEPSTACK_V if in_vit else variant,
        vision=_vision_config(settings),
        language=_language_config(settings, weights),
        stacks=StackConfig(
            num_crops=settings["num_crops"],
            grid=GridRule.FIXED_2X2 if in_vit or "2xsample" in flags else GridRule.BEST_FIT,
            sampler=_choice(Sampler, settings, "sampling"),
            start=start if in_vit and start is not None else settings["start_layer"],
            interval=1 if in_vit else settings["interval"],
        ),
    )


def _flags(settings: _Settings) -> tuple[set[str], int | None]:
    """The '+'-joined flags of `args`, and the N of lsvit_start_layer_N."""
    flags = set(filter(None, settings["args"].split("+")))
    starts = {flag for flag in flags if flag.startswith(SLOT_FLAG) and flag.removeprefix(SLOT_FLAG).isdecimal()}
    unknown = flags - starts - set(KNOWN_FLAGS[:2])
    if unknown or len(starts) > 1:
        wrong = ", ".join(sorted(unknown or starts))
        raise DataError(f"{settings.where}: cannot honour {wrong} in args; known: {', '.join(KNOWN_FLAGS)}")
    return flags, int(starts.pop().removeprefix(SLOT_FLAG)) if starts else None


def _vision_config(settings: _Settings) -> VisionConfig:
    vision = settings["vision"]
    return VisionConfig(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        activation=_choice(Activation, vision, "hidden_act"),
        select_layer=vision["select_layer"],
        layernorm_epsilon=vision.get("layer_norm_eps", 1e-5),
    )


def _language_config(settings: _Settings, weights: Mapping[str, Tensor]) -> LanguageConfig:
    """Biases, query/key norms and a tied head show in the weights' names."""
    language = settings["language"]
    return LanguageConfig(
        vocab_size=language["vocab_size"],
        hidden_size=language["hidden_size"],
        ffn_hidden_size=language["intermediate_size"],
        num_layers=language["num_hidden_layers"],
        num_heads=language["num_attention_heads"],
        num_kv_heads=language.get("num_key_value_heads"),
        head_dim=language.get("head_dim"),
        norm_epsilon=language["rms_norm_eps"],
        rope_theta=language["rope_theta"],
        qkv_bias=FIRST_LAYER + "q_proj.bias" in weights,
        qk_norm=FIRST_LAYER + "q_norm.weight" in weights,
        tied_embeddings="lm_head.weight" not in weights,
    )


def _sample(settings: _Settings, tensors: Mapping[str, Tensor], row: int) -> OracleSample:
    mask, where = tensors["attention_mask"][row].bool(), f"{settings.where}: row {row}"
    length = int(mask.sum())
    if not bool(mask[:length].all()):
        raise DataError(f"{where}: its attention mask {mask.int().tolist()} is not padded on the right")
    tokens, labels = tensors["input_ids"][row, :length].clone(), tensors["labels"][row, :length].clone()
    tokens[tokens == settings["image_token_id"]] = IMAGE_TOKEN_ID
    labels[labels == settings["ignore_index"]] = IGNORE_INDEX
    num_images = int((tokens == IMAGE_TOKEN_ID).sum())
    if num_images == 0:
        return OracleSample(tokens=tokens, labels=labels)
    if num_images > 1:
        raise DataError(f"{where}: {num_images} placeholders, but the format holds one image per row")
    gw, gh = settings["grids"][row]
    return OracleSample(tokens=tokens, labels=labels, pixel_values=tensors[f"pixel_values.{row}"], grids=((gw, gh),))


def _choice(enum: type[Choice], settings: _Settings, key: str) -> Choice:
    try:
        return enum(settings[key])
    except ValueError:
        known = ", ".join(str(member.value) for member in enum)
        raise DataError(f"{settings.where}: {key} is {settings[key]!r}; known: {known}") from None
