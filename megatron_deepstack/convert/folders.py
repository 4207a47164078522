"""`convert`: a folder of weights into a folder of another layout, without a run and without building the model.

Every tensor keeps its dtype and its bytes; only its name, leading dimensions of size 1 and rows of placeholders change.
One tensor at a time is in memory, so memory is bounded by the largest tensor, not by the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from megatron_deepstack.convert.export import require_room, write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.exported_folder import ExportedFolder, read_exported
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_writer import SHARD_BYTES
from megatron_deepstack.convert.vocabulary import require_rows
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.platform.quantity import data_size, number_of

_SHOWN: Final = 6
"""Names that a message lists."""


def convert_folder(
    source: str | Path,
    target: str | Path,
    naming: Naming,
    *,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> ExportedFolder:
    """Write a folder of weights in another layout.

    Args:
        source: See `read_exported`.
        target: Folder to create.
        naming: Whose names and files it has.
        shard_bytes: Size up to which tensors share a file.
        say: Called with lines about what is found, such as names of tensors that are left over.

    Returns:
        What `source` holds.

    Raises:
        CheckpointError: `source` holds no whole model of ours, or `target` exists.
        ConfigError: The other layout has no such model.
        DataError: `target` cannot be written, or transformers cannot have the tokenizer.
    """
    found = read_exported(source)
    size = sum(tensor.num_bytes for tensor in found.tensors.values())
    largest = max(tensor.num_bytes for tensor in found.tensors.values())
    say(
        f"convert: {source} -> {target}, {number_of(len(found.tensors), 'tensor')}, {data_size(size)}, one at a time "
        f"(the largest: {data_size(largest)})"
    )
    if found.left_over:
        shown = ", ".join(found.left_over[:_SHOWN]) + (", ..." if len(found.left_over) > _SHOWN else "")
        say(f"left out, since the model does not use them: {number_of(len(found.left_over), 'tensor')}: {shown}")
    if found.tokenizer is None:
        say(f"{source} holds no tokenizer; copy one into {target} before you prompt the model")
    require_room(Path(target), size)
    tokenizer = None if found.tokenizer is None else load_tokenizer(found.tokenizer)
    if tokenizer is not None:
        require_rows(tokenizer, found.model.language.vocab_size, str(source))
    about = About(data=found.data, seq_length=found.seq_length)
    write_model(found.tensors, found.model, Path(target), naming, tokenizer, about, shard_bytes)
    return found
