"""Writing a whole model for others to load: safetensors, and the files that `export_files` plans.

Every variant can be written under published names and under Hugging Face's, and `train.init_from` reads both back.
Under Hugging Face's names the folder is all that transformers needs: variant llava is a
`LlavaForConditionalGeneration`, the others bring the code of `convert.hf_folder`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.export_files import About, ExportPlan, plan_export, transformers_config
from megatron_deepstack.convert.hf_names import Naming, leading_ones, to_naming
from megatron_deepstack.convert.hf_whole_export import whole_folder
from megatron_deepstack.convert.hf_whole_written import require_whole
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.convert.tensor_writer import SHARD_BYTES, write_tensors
from megatron_deepstack.convert.vocabulary import lengthened
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import CheckpointError, DataError
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.weights import VISION_PREFIX
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.platform.quantity import data_size


def require_exportable(model: ModelConfig, output: Path, naming: Naming) -> None:
    """Refuse an export that cannot be made, before anything is loaded.

    Args:
        model: The recipe's model.
        output: The folder to be written.
        naming: Whose names the export has.

    Raises:
        ConfigError: Hugging Face has no such variant, tower, decoder or stacks.
        CheckpointError: `output` exists and is not an empty folder.
    """
    if model.variant.traits.whole_model is not None:
        require_whole(model)
    elif naming is Naming.HUGGING_FACE:
        transformers_config(model, model.language.vocab_size, 0)
    require_absent(output)


def require_absent(output: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        CheckpointError: `output` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; name another, nothing is overwritten")


def export_model(
    rank_model: RankModel,
    model: ModelConfig,
    output: Path,
    naming: Naming,
    tokenizer: Tokenizer | None = None,
    about: About | None = None,
) -> None:
    """Write a model into a new folder, whole or not at all.

    Not collective: one rank calls it, which holds the whole model (no tensor parallelism, one stage).

    Args:
        rank_model: The model; its tensors keep their dtype.
        model: The recipe's model.
        output: The folder.
        naming: Whose names the export has.
        tokenizer: Its files are written beside the tensors.
        about: How images and conversations are prepared for it, and its model card; the defaults of a recipe if None.

    Raises:
        ConfigError, CheckpointError: See `require_exportable`.
        DataError: The file system is full or may not be written, or transformers cannot have the tokenizer.
    """
    tensors = {name: LazyTensor.of(tensor) for name, tensor in published_tensors(rank_model).items()}
    write_model(tensors, model, output, naming, tokenizer, about)


def write_model(
    tensors: Mapping[str, LazyTensor],
    model: ModelConfig,
    output: Path,
    naming: Naming,
    tokenizer: Tokenizer | None = None,
    about: About | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors into a new folder, whole or not at all; one tensor at a time is in memory.

    Args:
        tensors: Every tensor of the model by its published name.
        model: The recipe's model.
        output: The folder.
        naming: Whose names the export has.
        tokenizer: See `export_model`.
        about: See `export_model`.
        shard_bytes: Size up to which tensors share a file.

    Raises:
        ConfigError, CheckpointError, DataError: See `export_model`.
    """
    require_exportable(model, output, naming)
    if model.variant.traits.whole_model is not None:
        whole = whole_folder(tensors, model, tokenizer, about or About())
        _write_folder(output, whole.tensors, whole.files, shard_bytes)
        return
    some = next(iter(tensors.values()))
    plan = plan_export(model, naming, tokenizer, str(some.dtype).removeprefix("torch."), about or About())
    fitting = _renamed(_fit_to_transformers(dict(tensors), model, plan), model, naming)
    _write_folder(output, fitting, plan.files, shard_bytes)


def _write_folder(
    output: Path, tensors: Mapping[str, LazyTensor], files: Mapping[str, bytes], shard_bytes: int
) -> None:
    with new_folder(output) as folder:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        with WorkProgress("export", total, "bytes") as progress:
            write_tensors(folder, tensors, shard_bytes, progress.at)
        for name, content in files.items():
            (folder / name).write_bytes(content)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all is in it; after a failure nothing of it is left.

    Args:
        output: The name that it takes.

    Yields:
        A folder beside it, to write into.

    Raises:
        DataError: The file system is full or may not be written.
    """
    unfinished = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{output}: cannot be written: {reason}; nothing of it is left. Name a folder on a file system with room"
        ) from error


def require_room(output: Path, num_bytes: int) -> None:
    """Refuse a folder that cannot be created or for which there is no room. Leaves nothing behind.

    Args:
        output: The folder that is going to be made.
        num_bytes: Size of the weights; the other files are small beside them.

    Raises:
        DataError: The file system is too full, or may not be written.
    """
    above = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=above):
            free = shutil.disk_usage(above).free
    except OSError as error:
        raise DataError(
            f"{output}: cannot be created: {error.strerror or error} (tried in {above}); name a folder that may be "
            "written"
        ) from error
    if free < num_bytes:
        raise DataError(
            f"{output}: about {data_size(num_bytes)} are needed, {above} has {data_size(free)} free; make room, or "
            "name a folder elsewhere"
        )


def _renamed(tensors: dict[str, LazyTensor], model: ModelConfig, naming: Naming) -> dict[str, LazyTensor]:
    """The tensors under the names, and in the shapes, that the naming has for them."""
    found = {}
    for name, tensor in tensors.items():
        is_llava = naming is Naming.HUGGING_FACE and model.variant.traits.is_llava
        shape = (1,) * (leading_ones(name, model) if is_llava else 0) + tensor.shape
        found[to_naming(name, naming, model)] = tensor.changed(shape, partial(torch.reshape, shape=shape))
    return found


def published_tensors(rank_model: RankModel) -> dict[str, torch.Tensor]:
    """Every tensor of a model that this rank holds whole.

    Args:
        rank_model: The model, without tensor parallelism and with one stage.

    Returns:
        Published name to the tensor, on the CPU, in the dtype that it has.
    """
    (chunk,) = rank_model.chunks
    assert chunk.chunk.has_embedding
    assert chunk.chunk.has_head
    assert rank_model.config.tensor_model_parallel_size == 1
    tensors: dict[str, torch.Tensor] = {}
    modules: list[tuple[torch.nn.Module, Any]] = [(rank_model.encoder, rank_model.encoder_rules)]
    modules += list(zip(rank_model.chunks, rank_model.chunk_rules, strict=True))
    for module, rules in modules:
        for name, parameter in module.named_parameters():
            parts = rules[name].published([parameter.detach().cpu()])
            tensors.update(zip(rules[name].names, parts, strict=True))
    return tensors


def _fit_to_transformers(tensors: dict[str, LazyTensor], model: ModelConfig, plan: ExportPlan) -> dict[str, LazyTensor]:
    """Add what transformers' model has and ours lacks: rows for the image token, and a tower's unused norm."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            shape = (plan.vocab_size, *tensors[name].shape[1:])
            tensors[name] = tensors[name].changed(shape, lambda rows: lengthened(rows, plan.vocab_size))
    if plan.has_final_norm:
        # transformers' towers end in a norm that no selected feature passes; ours have none, so it is the identity
        like = tensors[f"{VISION_PREFIX}embeddings.patch_embedding.weight"].dtype
        for kind, value in (("weight", 1.0), ("bias", 0.0)):
            norm = torch.full((model.vision.hidden_size,), value, dtype=like)
            tensors[f"{VISION_PREFIX}post_layernorm.{kind}"] = LazyTensor.of(norm)
    return tensors
