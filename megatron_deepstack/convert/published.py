"""Weights to start from: checkpoints on disk as the source of published tensors.

A checkpoint gives whole parts (vision tower, projector, decoder) or nothing of them. Parts may come from different
checkpoints, and a part that none has comes from somewhere else, such as a fresh projector. Refused is what would train
silently wrong: a part with missing tensors, a part that two checkpoints hold, a decoder with more tensors than the
recipe's, and a model that a checkpoint's own config contradicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.hf_config import read_config, require_same_model
from megatron_deepstack.convert.hf_names import by_published_name, part_of
from megatron_deepstack.convert.stacked_experts import is_of_expert, is_stack, read_expert
from megatron_deepstack.convert.tensor_files import files_by_name, lazy_tensor, read_part, read_tensor
from megatron_deepstack.convert.vocabulary import EMBEDDINGS, text_rows
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.layers.lora import is_adapter
from megatron_deepstack.model.rules import PartialSource, Shape, Source, Span
from megatron_deepstack.model.weights import LAYERS_PREFIX, decoder_layer_names
from megatron_deepstack.run_folder.starting_weights import StartingTensor, StartingWeights

_BUFFER = ".rotary_emb.inv_freq"
"""Frequencies of the rotary embedding, which old checkpoints store and `rope_theta` says."""
_SHOWN = 3
"""Names that an error lists."""


def published_source(
    paths: str | Path | Sequence[str | Path],
    fallback: Source | None = None,
    model: ModelConfig | None = None,
    seq_length: int | None = None,
) -> PublishedSource:
    """Checkpoints on disk as a source of full tensors. Not collective; every rank may open its own.

    Args:
        paths: Hugging Face folders or files, under published or Hugging Face's names.
        fallback: Where parts come from that no checkpoint holds.
        model: The recipe's model. With it, what a folder's config.json says and shapes do not show (heads, norms,
            rotary base, ...) must agree too, and every tensor of a decoder layer must have a place in it.
        seq_length: Longest sequence of the run, up to which an attention window makes no difference.

    Returns:
        A function of a tensor's published name and shape to the tensor, float32 on the CPU. It raises CheckpointError
        for a tensor that is missing from a part a checkpoint holds, or from all where there is no fallback, and for
        one of another shape.

    Raises:
        CheckpointError: Two checkpoints hold the same part, one holds nothing of ours, or one describes another model.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    checkpoints = [_open(Path(path), model, seq_length) for path in paths]
    _require_disjoint(checkpoints)
    return PublishedSource(checkpoints, fallback)


class PublishedSource(PartialSource):
    """Checkpoints as a source of tensors, and where it takes each from."""

    def __init__(self, checkpoints: Sequence[_Checkpoint], fallback: Source | None) -> None:
        """See `published_source`."""
        self._checkpoints, self._fallback = checkpoints, fallback

    def __call__(self, name: str, shape: Shape) -> torch.Tensor:
        """The tensor of a published name, see `published_source`."""
        return self.stored(name, shape).float()

    def part(self, name: str, shape: Shape, span: Span) -> torch.Tensor:
        """A part of a tensor, see `published_source`. Of safetensors files nothing else is read.

        Args:
            name: Its published name.
            shape: The shape of all of it.
            span: Which part.

        Returns:
            The part, float32 on the CPU.

        Raises:
            CheckpointError: See `published_source`.
        """
        for checkpoint in self._checkpoints:
            if checkpoint.answers_for(name):
                return checkpoint.read_part(name, shape, span).float()
        if isinstance(self._fallback, PartialSource):
            return self._fallback.part(name, shape, span)
        return span.of(self(name, shape))

    def stored(self, name: str, shape: Shape) -> torch.Tensor:
        """A tensor in the dtype that it has in its file.

        Args:
            name: Its published name.
            shape: Its shape.

        Returns:
            The tensor, on the CPU.

        Raises:
            CheckpointError: See `published_source`.
        """
        for checkpoint in self._checkpoints:
            if checkpoint.answers_for(name):
                return checkpoint.read(name, shape)
        if self._fallback is None:
            where = ", ".join(str(checkpoint.path) for checkpoint in self._checkpoints)
            raise CheckpointError(_missing(where, name, shape))
        return self._fallback(name, shape)

    def origin(self, name: str) -> tuple[Path, str] | None:
        """The file of a tensor and its name there.

        Args:
            name: Its published name.

        Returns:
            None for a tensor that no checkpoint holds.
        """
        for checkpoint in self._checkpoints:
            if name in checkpoint.names:
                own = checkpoint.names[name]
                return checkpoint.files[own], own
        return None

    def names(self) -> Iterator[tuple[Path, str]]:
        """File and name of every tensor in the checkpoints, whether it is one of ours or not."""
        for checkpoint in self._checkpoints:
            yield from ((file, own) for own, file in checkpoint.files.items())


def starting_weights(shapes: Mapping[str, Shape], source: PublishedSource | None) -> StartingWeights:
    """Where each tensor of a model comes from when a run begins.

    Args:
        shapes: Every tensor of the model by its published name.
        source: The checkpoints; None if there are none.

    Returns:
        The list; what no checkpoint holds is drawn at random.
    """
    tensors, used = [], set()
    for name, shape in shapes.items():
        found = None if source is None else source.origin(name)
        part = "adapters" if is_adapter(name) else str(part_of(name) or "newline")
        file, own = (None, None) if found is None else (str(found[0]), found[1])
        tensors.append(StartingTensor(name=name, part=part, shape=shape, file=file, name_in_file=own))
        used.add(found)
    left = () if source is None else tuple(f"{file}: {own}" for file, own in source.names() if (file, own) not in used)
    return StartingWeights(tensors=tuple(tensors), left_over=left)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    path: Path
    files: dict[str, Path]
    """Name in the checkpoint to its file."""
    names: dict[str, str]
    """Published name to name in the checkpoint."""
    text_rows: int | None
    """Rows of its embedding that stand for text, see `vocabulary.text_rows`."""
    parts: frozenset[object]
    """What it holds any tensor of; a newline comes with no part and answers for itself."""

    def answers_for(self, name: str) -> bool:
        """Whether the tensor comes from here, or is missing here; adapters are the run's own."""
        belongs = not is_adapter(name) and part_of(name) is not None and part_of(name) in self.parts
        return name in self.names or belongs

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        if name not in self.names:
            raise CheckpointError(_missing(str(self.path), name, shape))
        own = self.names[name]
        if is_stack(own) and is_of_expert(name):
            return read_expert(self.files[own], own, name, shape).float()
        tensor = read_tensor(self.files[own], own)
        tensor = _without_leading_ones(tensor, len(shape))
        if name in EMBEDDINGS and self.text_rows == shape[0]:
            tensor = tensor[: shape[0]]  # placeholders and padding behind the words
        if name in EMBEDDINGS and tuple(tensor.shape[1:]) == shape[1:] and len(tensor) != shape[0]:
            raise CheckpointError(
                f"{self.path}: {own} has {len(tensor)} rows, the recipe's vocabulary {shape[0]}: tokens were added, or "
                f"the vocabulary was resized; set model.language.vocab_size={len(tensor)}"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.path}: {own} has shape {tuple(tensor.shape)}, the recipe's model needs {shape}; choose the "
                "model the checkpoint was made with"
            )
        return tensor

    def read_part(self, name: str, shape: Shape, span: Span) -> torch.Tensor:
        """A part of a tensor. Where its file holds another shape, `read` looks at all of it.

        Args:
            name: Its published name.
            shape: The shape of all of it.
            span: Which part.

        Returns:
            The part, in the dtype of its file.

        Raises:
            CheckpointError: As `read` does.
        """
        own = self.names.get(name)
        if own is None or span.start == span.stop or lazy_tensor(self.files[own], own).shape != shape:
            return span.of(self.read(name, shape))
        return read_part(self.files[own], own, (slice(None),) * span.dim + (slice(span.start, span.stop),))


def _without_leading_ones(tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    """Some programs keep a vector as (1, 1, C)."""
    while tensor.ndim > num_dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _open(path: Path, model: ModelConfig | None, seq_length: int | None) -> _Checkpoint:
    files = files_by_name(path)
    names = by_published_name(files, str(path), model)
    if not names:
        raise CheckpointError(
            f"{path}: no tensor has a name of a LLaMA-type decoder, a CLIP-type vision tower or a LLaVA model; "
            f"found {', '.join(sorted(files)[:3]) or 'none at all'}"
        )
    config = read_config(path)
    if model is not None:
        require_same_model(config, model, str(path), seq_length)
        _require_places(names, model, path)
    parts = frozenset(part_of(name) for name in names)
    return _Checkpoint(path=path, files=files, names=names, text_rows=text_rows(config), parts=parts)


def _require_places(names: Mapping[str, str], model: ModelConfig, path: Path) -> None:
    """Refuse tensors of decoder layers that the recipe's decoder has not; a tower's last layers may be left out."""
    asked = decoder_layer_names(model)
    left = [
        name
        for published, name in names.items()
        if published.startswith(LAYERS_PREFIX) and published not in asked and not published.endswith(_BUFFER)
    ]
    if left:
        shown = ", ".join(sorted(left)[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
        raise CheckpointError(
            f"{path}: {len(left)} tensors of decoder layers have no place in the recipe's model of "
            f"{model.language.num_layers} layers: {shown}; set model.language (num_layers, qkv_bias, qk_norm) as the "
            "checkpoint was made"
        )


def _require_disjoint(checkpoints: Sequence[_Checkpoint]) -> None:
    holders: dict[object, Path] = {}
    for checkpoint in checkpoints:
        for part in checkpoint.parts:
            if part in holders:
                raise CheckpointError(
                    f"train.init_from: {holders[part]} and {checkpoint.path} both hold the {part or 'newline'}; "
                    "name checkpoints of different parts"
                )
            holders[part] = checkpoint.path


def _missing(path: str, name: str, shape: Shape) -> str:
    hint = "complete it, or choose the model it was made with"
    if name == "lm_head.weight":
        hint = "if it ties output and input embeddings, set model.language.tied_embeddings=true"
    return f"{path}: holds no tensor {name}; expected shape {shape}; {hint}"
