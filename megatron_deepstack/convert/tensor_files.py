"""Reading files of tensors: one, or several with an index, in the form of safetensors or of PyTorch (older releases).

Nothing is read before it is asked for, and a PyTorch file is read without running code from it.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_deepstack.config.run_folder import RECIPE_FILE
from megatron_deepstack.data.file_kind import what_is_at
from megatron_deepstack.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FORMS = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""Index and single file, in the order in which a folder is searched."""
_OTHER_FILES = ", which the folder's index says it does; the files do not belong together: fetch all of them again"
_ADVICE = {
    "incomplete metadata": "; it is cut off, or still being written: fetch or write it again",
    "InvalidHeader": "; it is damaged: fetch or write it again",
    "does not contain tensor": _OTHER_FILES,
}
"""What to do, by words in what the safetensors library says."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in safetensors files."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """Gives the tensor, on the CPU."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def changed(self, shape: tuple[int, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
        """The tensor after a change, which is made when the result is read.

        Args:
            shape: The shape after the change; the dtype stays.
            change: Makes the changed tensor of the one that was read.

        Returns:
            The changed tensor, not read yet.
        """
        return LazyTensor(shape, self.dtype, lambda: change(self.read()))


def files_by_name(path: Path) -> dict[str, Path]:
    """Where each tensor of a checkpoint lies.

    Args:
        path: A folder, or a single file.

    Returns:
        Tensor name to the file that holds it.

    Raises:
        CheckpointError: Nothing readable is found, or files that an index names are missing.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a safetensors file or a Hugging Face folder with {SINGLE}"
        )
    if not path.is_dir():
        return dict.fromkeys(_names(path), path)
    for index, single in _FORMS:
        if (path / index).is_file():
            return _from_index(path / index)
        if (path / single).is_file():
            return dict.fromkeys(_names(path / single), path / single)
    if (path / RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{path}: is the folder of a run, which holds no weights by published names; `export` it and name the "
            "export, or go on in it with run_dir"
        )
    expected = ", ".join(name for form in _FORMS for name in form)
    raise CheckpointError(f"{path}: holds none of {expected}; name a Hugging Face folder or a file")


def _from_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of tensors: {_reason(index, error)}") from error
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise CheckpointError(f"{index}: names {', '.join(missing)}, not there; finish the download or the copy")
    return files


def _names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {_reason(file, error)}") from error
    return list(_torch_file(file))


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor on the CPU, in the dtype that it has in the file.

    Args:
        file: A safetensors file, or a PyTorch file that maps names to tensors.
        name: The tensor's name in it.

    Raises:
        CheckpointError: The file cannot be read.
    """
    if file.suffix != ".safetensors":
        return _of_torch_file(file, name)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: {_reason(file, error)}") from error


def read_part(file: Path, name: str, part: tuple[int | slice, ...]) -> torch.Tensor:
    """A part of a tensor on the CPU; of a safetensors file nothing else is read.

    Args:
        file: See `read_tensor`.
        name: The tensor's name in it.
        part: As an index of the tensor.

    Raises:
        CheckpointError: The file cannot be read.
    """
    if file.suffix != ".safetensors":
        return _of_torch_file(file, name)[part]
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)[part]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: {_reason(file, error)}") from error


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read: what it really is, or else what its reader says."""
    what = what_is_at(file)
    if what and (file.suffix == ".safetensors" or not what.startswith("a zip archive")):  # as PyTorch's own files are
        return f"it is {what}"
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return said + next((advice for words, advice in _ADVICE.items() if words in said), "")


def _of_torch_file(file: Path, name: str) -> torch.Tensor:
    """A tensor of a PyTorch file. Raises CheckpointError if it is not there."""
    tensors = _torch_file(file)
    if name not in tensors:
        raise CheckpointError(f"{file}: does not contain tensor {name}{_OTHER_FILES}")
    return tensors[name]


@lru_cache(maxsize=4)
def _torch_file(file: Path) -> Mapping[str, torch.Tensor]:
    """A mapped PyTorch file: pages are read as tensors are used."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors or as a PyTorch file of tensors: {_reason(file, error)}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: expected a PyTorch file that maps names to tensors")
    return tensors


def lazy_tensor(file: Path, name: str) -> LazyTensor:
    """A tensor of a file whose shape and dtype are known, and which is read only when it is asked for.

    Args:
        file: A safetensors file, or a PyTorch file that maps names to tensors.
        name: The tensor's name in it.

    Raises:
        CheckpointError: The file cannot be read, now or when the tensor is asked for.
    """
    if file.suffix != ".safetensors":
        tensor = _of_torch_file(file, name)
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
    try:
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: {_reason(file, error)}") from error
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, which is not read here, only {known}")
    return LazyTensor(shape, DTYPES[dtype], lambda: read_tensor(file, name))
