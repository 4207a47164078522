"""Files of tensors: one, or several with an index, in the form of safetensors, or in PyTorch's own (older releases).

Nothing is read before it is asked for, and a PyTorch file is read without running code from it.
"""

from __future__ import annotations

import json
import pickle
import stat
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_deepstack.data.file_kind import what_is_at
from megatron_deepstack.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FORMS = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
"""Index and single file, in the order in which a folder is searched."""
SHARD_BYTES = 5 * 10**9
"""Size up to which tensors share a file."""


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
        return _torch_file(file)[name]
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: {_reason(file, error)}") from error


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read: what it really is, or else what its reader says."""
    what = what_is_at(file)
    if what and (file.suffix == ".safetensors" or not what.startswith("a zip archive")):  # as PyTorch's own files are
        return f"it is {what}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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


def write_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[float], None] = lambda num_bytes: None,
) -> None:
    """Write safetensors as Hugging Face does: one file, or several with an index.

    Args:
        folder: Where they are written; it must be there.
        tensors: By name.
        shard_bytes: Size up to which tensors share a file.
        progress: Told the bytes that are written so far, after each of several files.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write(folder / SINGLE, tensors, shards[0])
        return
    weight_map, written = {}, 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, tensors, names)
        weight_map.update(dict.fromkeys(names, file))
        written += sum(tensors[name].nbytes for name in names)
        progress(written)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would exceed `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write(file: Path, tensors: Mapping[str, torch.Tensor], names: list[str]) -> None:
    """One file, readable for whom the umask says; safetensors itself creates it for its owner alone."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file({name: tensors[name].contiguous() for name in names}, str(file), metadata={"format": "pt"})
    file.chmod(mode)
