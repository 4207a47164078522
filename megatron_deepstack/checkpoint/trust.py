"""What loading a checkpoint may execute: nothing.

Tensors and the optimizer's common part are read by PyTorch's weights-only rules. Three things are not: the index
(`.metadata`), which PyTorch unpickles, small objects among the tensors, which its planner unpickles, and what
Transformer Engine's layers keep of FP8 beside their weights, which they unpickle from the bytes of a tensor. All are
looked through first, and refused where they name anything but data; the last is read under delayed scaling alone.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_deepstack.checkpoint.saving.commit import INDEX
from megatron_deepstack.errors import CheckpointError

_STORAGES = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}
"""What pickles name for a tensor's storage: torch's own, which unpickles its bytes in their turn, and what
Megatron-Core puts in its place after 0.16."""
EXTRA_STATE = "_extra_state"
"""Ends the keys of what a layer keeps beside its weights; a number of the part may follow."""
_EXTRA_STATE_NAME = re.compile(rf"{EXTRA_STATE}\d*$")
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "collections": {"OrderedDict"},
}
"""Classes of an index, by module; besides these only dtypes."""
_ALLOWED_IN_EXTRA_STATES = {
    "transformer_engine.common.recipe": {"DelayedScaling", "Format", "_FormatHelper"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
}
"""What delayed scaling is made of, by module: its settings, and histories as tensors."""


def is_extra_state(name: str) -> bool:
    """Whether this is the name of what a layer keeps beside its weights; grouped experts have one for each expert."""
    return _EXTRA_STATE_NAME.search(name) is not None


def check_contents(folder: Path) -> None:
    """Look through index and objects of a checkpoint. Raises CheckpointError that names what is not data."""
    for _ in _objects(folder, _index(folder), ""):
        pass


def check_extra_states(folder: Path) -> None:
    """Look through the bytes that Transformer Engine's layers unpickle. Raises CheckpointError as `check_contents`."""
    for key, found in _objects(folder, _index(folder), EXTRA_STATE):
        for content in found if isinstance(found, list) else [found]:
            try:
                _check_extra_state(content)
            except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, ImportError) as error:
                raise CheckpointError(f"{folder}: the extra state {key} holds more than data: {error}") from error


def _index(folder: Path) -> Metadata:
    try:
        with (folder / INDEX).open("rb") as stream:
            index = _IndexReader(stream).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its index {INDEX} cannot be read: {error}") from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{folder}: {INDEX} is no index of a checkpoint")
    return index


class _IndexReader(pickle.Unpickler):
    """Unpickles an index, and nothing that an index does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index holds; do not load this checkpoint")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _objects(folder: Path, index: Metadata, part_of_key: str) -> Iterator[tuple[str, Any]]:
    """Key and content of every object whose key holds `part_of_key`."""
    for place, stored in (index.storage_data or {}).items():
        key = place.fqn
        if part_of_key not in key or not isinstance(index.state_dict_metadata.get(key), BytesStorageMetadata):
            continue
        with (folder / stored.relative_path).open("rb") as stream:
            stream.seek(stored.offset)
            content = stream.read(stored.length)
        try:
            yield key, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{folder}: the object {key} holds more than data: {error}") from error


def _check_extra_state(content: Any) -> None:
    """Raises pickle.UnpicklingError and what else broken bytes raise."""
    if content is None:
        return
    if not isinstance(content, torch.Tensor):
        raise TypeError(f"it is a {type(content).__name__}; Transformer Engine 2 keeps a tensor of bytes")
    if content.numel():
        _ExtraStateReader(io.BytesIO(content.numpy().tobytes())).load()


class _ExtraStateReader(pickle.Unpickler):
    """Unpickles a layer's extra state, and nothing that delayed scaling does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return _storage_of
        if name in _ALLOWED_IN_EXTRA_STATES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}; do not load this checkpoint")


def _storage_of(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
