"""Writing safetensors tensor by tensor: one file, or several with an index, as Hugging Face does.

A file of safetensors is the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor),
and the tensors' bytes. Shapes and dtypes are known before a tensor is read, so the header goes first and the tensors
follow one at a time. Memory is bounded by the largest tensor, whatever the size of a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch

from megatron_deepstack.convert.tensor_files import DTYPES, INDEX, SINGLE, LazyTensor

SHARD_BYTES: Final = 5 * 10**9
"""Size up to which tensors share a file."""
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED_TO: Final = 8
"""The header is filled with spaces to a multiple of this, so that tensors begin at aligned places."""


def write_tensors(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[float], None] = lambda num_bytes: None,
) -> None:
    """Write tensors in the order given. One tensor at a time is in memory.

    Args:
        folder: Where they are written; it must be there.
        tensors: By name.
        shard_bytes: Size up to which tensors share a file; a larger tensor has a file of its own.
        progress: Told the bytes that are written so far, after each tensor.

    Raises:
        OSError: The file system is full or may not be written.
    """
    shards, done = _shards(tensors, shard_bytes), 0.0
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as opened:
            opened.write(_header({name: tensors[name] for name in names}))
            for name in names:
                _write(opened, name, tensors[name])
                done += tensors[name].num_bytes
                progress(done)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would exceed `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.num_bytes
        described[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED_TO)
    return len(text).to_bytes(8, "little") + text


def _write(opened: IO[bytes], name: str, tensor: LazyTensor) -> None:
    value = tensor.read().contiguous()
    found = (tuple(value.shape), value.dtype)
    assert found == (tensor.shape, tensor.dtype), f"{name}: {found} for {(tensor.shape, tensor.dtype)}"
    opened.write(value.reshape(-1).view(torch.uint8).numpy().data)
