"""What loading a checkpoint may execute: nothing.

Tensors and the optimizer's common part are read by PyTorch's weights-only rules. Two things are not: the index
(`.metadata`), which PyTorch unpickles, and small objects among the tensors, which its planner unpickles. Both are
looked through first, and refused where they name anything but data.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_deepstack.checkpoint.commit import INDEX
from megatron_deepstack.errors import CheckpointError

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


def check_contents(folder: Path) -> None:
    """Look through index and objects of a checkpoint. Raises CheckpointError that names what is not data."""
    try:
        with (folder / INDEX).open("rb") as stream:
            index = _IndexReader(stream).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its index {INDEX} cannot be read: {error}") from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{folder}: {INDEX} is no index of a checkpoint")
    for key, stored in index.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            _check_object(folder, key, index)


class _IndexReader(pickle.Unpickler):
    """Unpickles an index, and nothing that an index does not hold."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index holds; do not load this checkpoint")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _check_object(folder: Path, key: str, index: Metadata) -> None:
    for place, stored in (index.storage_data or {}).items():
        if place.fqn != key:
            continue
        with (folder / stored.relative_path).open("rb") as stream:
            stream.seek(stored.offset)
            content = stream.read(stored.length)
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{folder}: the object {key} holds more than data: {error}") from error
