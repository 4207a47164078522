"""What transformers makes of drawn samples: logits, loss and gradients, one sample after another on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.convert.hf_names import to_published
from megatron_deepstack.convert.hf_whole import used_tensors
from megatron_deepstack.convert.stacked_experts import taken_apart
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.views import TileGrid, ViewGrid
from megatron_deepstack.testing.parity.drawn import DrawnSample

MOST_FLOAT64: Final = 400_000_000
"""Parameters up to which transformers computes in float64, so that a difference is this system's rounding alone."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers computes; float32 on the CPU."""

    logits: list[torch.Tensor]
    """Per sample (T, vocabulary)."""
    loss: float
    """Mean over the targets of all samples."""
    gradients: dict[str, torch.Tensor]
    """By published name."""


def by_transformers(
    folder: Path, model: ModelConfig, config: Mapping[str, Any], samples: Sequence[DrawnSample]
) -> Expected:
    """Compute the samples with transformers.

    Args:
        folder: The folder.
        model: Its model.
        config: Content of its config.json.
        samples: The samples.

    Returns:
        Logits, loss and gradients.
    """
    from transformers import AutoModelForImageTextToText

    more: dict[str, Any] = (
        {"experts_implementation": "eager"} if model.language.num_experts else {}
    )  # the others know no float64
    more["ignore_mismatched_sizes"] = True  # a tensor of a wrong shape is refused by name where the ranks read it
    module = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **more
    )
    module.eval()
    if sum(parameter.numel() for parameter in module.parameters()) <= MOST_FLOAT64:
        module.double()
    inputs = _INPUTS[model.variant]
    logits, total, num_targets = [], 0.0, sum(int((s.expanded(model).labels != IGNORE_INDEX).sum()) for s in samples)
    for sample in samples:
        expanded = sample.expanded(model)
        given = inputs(sample, model, config, module.dtype)
        output = module(**given, use_cache=False, **_ROUTER_LOGITS if expert_layers(model.language) else {})
        found, labels = output.logits[0], torch.from_numpy(expanded.labels)
        loss = torch.nn.functional.cross_entropy(found, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        balance = _balance(output, model) * int((labels != IGNORE_INDEX).sum())
        ((loss + balance) / num_targets).backward()
        logits.append(found.detach().float())
        total += loss.item()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in used_tensors(dict(module.named_parameters()), model).items():
        published = to_published(name, model)
        assert published is not None, f"transformers has a parameter {name} that has no name here"
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.update(taken_apart(published, gradient))
    return Expected(logits, total / num_targets, {name: value.float() for name, value in gradients.items()})


_ROUTER_LOGITS: Final = {"output_router_logits": True}


def _balance(output: Any, model: ModelConfig) -> torch.Tensor | float:
    """The loss that balances experts, by transformers' own function, layer by layer, and its mean over layers."""
    if not expert_layers(model.language) or not model.language.balance_loss:
        return 0.0
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    language = model.language
    total: torch.Tensor | float = 0.0
    for logits in output.router_logits:
        total = total + load_balancing_loss_func((logits,), language.num_experts, language.num_active_experts)
    return language.balance_loss / len(output.router_logits) * total


def model_inputs(
    sample: DrawnSample, model: ModelConfig, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """What transformers' model takes for a sample.

    Args:
        sample: The sample.
        model: The folder's model, of a variant that transformers has itself.
        config: Content of its config.json.
        dtype: Of the pixels.

    Returns:
        Keyword arguments of the model.
    """
    return _INPUTS[model.variant](sample, model, config, dtype)


def special_tokens(model: ModelConfig, config: Mapping[str, Any], where: str) -> list[int]:
    """Token ids that stand for images, videos or padding, which text must not contain.

    transformers gives the row of padding in the embedding no gradient.

    Args:
        model: The folder's model.
        config: Content of its config.json.
        where: Path of that file, for messages.

    Returns:
        Their ids: those that the config names, and those that transformers takes where it names none.

    Raises:
        CheckpointError: Such an id has no row in the embedding, so that transformers cannot read it.
    """
    found: list[int] = []
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_index")) and value is not None:
            found += value if isinstance(value, list) else [value]
    padding = (config.get("text_config") or {}).get("pad_token_id")
    if padding is not None:
        found.append(padding % model.language.vocab_size if padding < 0 else padding)  # PyTorch counts from the end
    for key, default in _DEFAULT_IDS[model.variant].items():
        if config.get(key) is None and config.get(_OTHER_KEYS.get(key, key)) is None:
            found.append(default)
    outside = [number for number in found if number >= model.language.vocab_size]
    if outside:
        raise CheckpointError(
            f"{where}: the token ids {outside} of images lie outside the vocabulary of {model.language.vocab_size}; "
            "set image_token_id and its siblings to ids within it"
        )
    return found


_QWEN3_VL_IDS: Final = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_DEFAULT_IDS: Final[Mapping[Variant, Mapping[str, int]]] = {
    Variant.QWEN3_VL: _QWEN3_VL_IDS,
    Variant.QWEN3_VL_MOE: _QWEN3_VL_IDS,
    Variant.GRANITE4_VISION: {"image_token_index": 32000},
}
"""What transformers takes where a config names no id."""
_OTHER_KEYS: Final = {"image_token_index": "image_token_id"}
"""Another key for the same id."""


def _qwen3_vl(sample: DrawnSample, model: ModelConfig, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of Qwen3-VL as its processor makes them; a video's frame pairs are one video."""
    expanded = sample.expanded(model)
    ids, kinds = torch.from_numpy(expanded.tokens.copy())[None], torch.zeros(1, expanded.length, dtype=torch.int64)
    defaults = _DEFAULT_IDS[model.variant]
    grids = [shape for shape in sample.shapes if isinstance(shape, ViewGrid)]
    moving = any(grid.moving for grid in grids)
    key = "video_token_id" if moving else "image_token_id"
    number = config.get(key)
    for span in expanded.spans:
        ids[0, span.start : span.start + span.length] = defaults[key] if number is None else number
        kinds[0, span.start : span.start + span.length] = 2 if moving else 1
    found: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": kinds}
    if not grids:
        return found
    patches = [patches_by_definition(one, grid, model) for one, grid in zip(sample.pixels, grids, strict=True)]
    values = torch.from_numpy(np.concatenate(patches)).to(dtype)
    if moving:
        whole = torch.tensor([[len(grids), grids[0].height, grids[0].width]])
        return {**found, "pixel_values_videos": values, "video_grid_thw": whole}
    shapes = torch.tensor([[grid.frames, grid.height, grid.width] for grid in grids])
    return {**found, "pixel_values": values, "image_grid_thw": shapes}


def _granite(sample: DrawnSample, model: ModelConfig, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of Granite 4 Vision: the views of all images one after another, and the sizes of the images."""
    expanded = sample.expanded(model)
    ids = torch.from_numpy(expanded.tokens.copy())[None]
    given = (config.get(key) for key in ("image_token_index", "image_token_id"))
    number = next((value for value in given if value is not None), 32000)
    for span in expanded.spans:
        ids[0, span.start : span.start + span.length] = number
    if not sample.shapes:
        return {"input_ids": ids}
    mean, std = np.array(model.vision.mean), np.array(model.vision.std)
    views = (np.concatenate(sample.pixels) / 255.0 - mean) / std
    sizes = [[shape.image_height, shape.image_width] for shape in sample.shapes if isinstance(shape, TileGrid)]
    values = torch.from_numpy(views).permute(0, 3, 1, 2).to(dtype)
    return {"input_ids": ids, "pixel_values": values, "image_sizes": torch.tensor(sizes)}


def patches_by_definition(pixels: np.ndarray, grid: ViewGrid, model: ModelConfig) -> np.ndarray:
    """Patches of a view as the published processor orders them, written as loops.

    Args:
        pixels: uint8 (pictures, height, width, 3).
        grid: The patches.
        model: The model, whose tower says the size of patches and how pixels are normalised.

    Returns:
        float64 (patches, 3 * frames of a patch * patch * patch): block after block of merged patches, line by line
        within it; of each patch the channels, of each channel the frames.
    """
    p, m, t = model.vision.patch_size, model.vision.merge_size, model.vision.temporal_patch_size
    mean, std = np.array(model.vision.mean), np.array(model.vision.std)
    values = (pixels / 255.0 - mean) / std
    found = []
    for frame in range(grid.frames):
        pictures = values[frame * t : frame * t + t] if grid.moving else np.repeat(values[frame : frame + 1], t, axis=0)
        for block_y in range(0, grid.height, m):
            for block_x in range(0, grid.width, m):
                for y in range(block_y, block_y + m):
                    for x in range(block_x, block_x + m):
                        patch = pictures[:, y * p : y * p + p, x * p : x * p + p]
                        found.append(patch.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(found)


_Inputs = Callable[[DrawnSample, ModelConfig, Mapping[str, Any], torch.dtype], dict[str, Any]]
_INPUTS: Final[Mapping[Variant, _Inputs]] = {
    Variant.QWEN3_VL: _qwen3_vl,
    Variant.QWEN3_VL_MOE: _qwen3_vl,
    Variant.GRANITE4_VISION: _granite,
}
