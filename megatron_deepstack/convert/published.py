"""Weights to start from: a checkpoint on disk as the source of published tensors.

A checkpoint gives whole parts (vision tower, projector, decoder) or nothing of them. What part it lacks comes from
somewhere else, as a fresh projector does; but a part with holes, or a model that its own config contradicts, would
train silently wrong and is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.hf_config import read_config, require_same_model
from megatron_deepstack.convert.hf_names import by_published_name, part_of
from megatron_deepstack.convert.tensor_files import files_by_name, read_tensor
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.weights import Shape, Source


def published_source(path: str | Path, fallback: Source | None = None, model: ModelConfig | None = None) -> Source:
    """Source of full float32 tensors in a Hugging Face folder or a file, under published or Hugging Face's names.

    Parts that the checkpoint lacks come from `fallback`. CheckpointError names a tensor that is missing from a part the
    checkpoint holds, or from the checkpoint where there is no fallback, and one of another shape. With `model`, what
    the folder's config.json says and shapes do not show (heads, norms, rotary base, ...) must agree too.
    """
    files = files_by_name(Path(path))
    names = by_published_name(files, str(path))
    if not names:
        raise CheckpointError(
            f"{path}: no tensor has a name of a LLaMA-type decoder, a CLIP-type vision tower or a LLaVA model; "
            f"found {', '.join(sorted(files)[:3]) or 'none at all'}"
        )
    if model is not None:
        require_same_model(read_config(Path(path)), model, str(path))
    parts = {part_of(name) for name in names}

    def read(name: str, shape: Shape) -> torch.Tensor:
        if name not in names:
            if fallback is not None and (part_of(name) is None or part_of(name) not in parts):
                return fallback(name, shape)
            raise CheckpointError(_missing(path, name, shape))
        tensor = read_tensor(files[names[name]], names[name])
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: {names[name]} has shape {tuple(tensor.shape)}, the recipe's model needs {shape}; choose the "
                "model the checkpoint was made with"
            )
        return tensor.float()

    return read


def _missing(path: str | Path, name: str, shape: Shape) -> str:
    hint = "complete it, or choose the model it was made with"
    if name == "lm_head.weight":
        hint = "if it ties output and input embeddings, set model.language.tied_embeddings=true"
    return f"{path}: holds no tensor {name}; expected shape {shape}; {hint}"
