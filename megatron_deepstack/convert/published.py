"""Reading and writing checkpoints under the published names, as safetensors.

The published DeepStack checkpoints carry LLaVA's names (`model.layers.0.self_attn.q_proj.weight`,
`model.mm_projector.0.weight`, `model.vision_tower.vision_tower.vision_model...`), in one file or in several with
`model.safetensors.index.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.weights import Shape, Source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def published_source(path: str | Path, fallback: Source | None = None) -> Source:
    """Source of full tensors in a safetensors file, or a folder with one or with an index.

    A tensor that the files lack comes from `fallback` (a fresh projector on pretrained towers); without one, and for a
    tensor of another shape, CheckpointError names it.
    """
    files = _files_by_name(Path(path))

    def read(name: str, shape: Shape) -> torch.Tensor:
        if name not in files:
            if fallback is None:
                raise CheckpointError(f"{path}: holds no tensor {name}; expected shape {shape}")
            return fallback(name, shape)
        with safe_open(files[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the recipe's model needs {shape}; choose the model "
                "the checkpoint was made with"
            )
        return tensor.float()

    return read


def _files_by_name(path: Path) -> dict[str, Path]:
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; train.init_from takes a safetensors file or folder"
        )
    try:
        if path.is_dir() and (path / INDEX).is_file():
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: path / file for name, file in weight_map.items()}
        file = path / SINGLE if path.is_dir() else path
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def write_published(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write full tensors under published names into one file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(partial))
    partial.rename(path)
