"""Writing a whole model for others to load: safetensors, config.json, and how pictures are prepared for it.

Every variant can be written under published names, and `train.init_from` reads it back. Under Hugging Face's names the
result is a `LlavaForConditionalGeneration`, so these are for variant llava alone, which adds no stacks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_deepstack.config.schema import ModelConfig, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.convert.hf_facts import CONFIG
from megatron_deepstack.convert.hf_names import Naming, leading_ones, to_naming
from megatron_deepstack.convert.hf_whole_export import whole_folder
from megatron_deepstack.convert.hf_written import hf_tower, llava_config, published_config
from megatron_deepstack.convert.tensor_files import write_tensors
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import CheckpointError, ConfigError, DataError
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.weights import VISION_PREFIX
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.platform.quantity import data_size

PREPROCESSOR = "preprocessor_config.json"
VOCABULARY_MULTIPLE = 64
"""Size that Hugging Face's LLaVA pads its vocabulary to, behind the image token."""
_BICUBIC = 3


def require_exportable(model: ModelConfig, output: Path, naming: Naming) -> None:
    """Refuse an export that cannot be made, before anything is loaded.

    Args:
        model: The recipe's model.
        output: The folder to be written.
        naming: Whose names the export has.

    Raises:
        ConfigError: Hugging Face has no such variant, tower or decoder.
        CheckpointError: `output` exists and is not an empty folder.
    """
    if naming is Naming.HUGGING_FACE and model.variant.traits.whole_model is None:
        if not model.variant.traits.is_llava:
            raise ConfigError(
                [
                    f"model.variant: transformers has no model that computes {model.variant}; export with "
                    f"{Naming.PUBLISHED} names, or train variant llava"
                ]
            )
        llava_config(model, model.language.vocab_size, 0, 0)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; name another, nothing is overwritten")


def export_model(
    rank_model: RankModel, model: ModelConfig, output: Path, naming: Naming, tokenizer: Tokenizer | None = None
) -> None:
    """Write a model into a new folder, whole or not at all.

    Not collective: one rank calls it, which holds the whole model (no tensor parallelism, one stage).

    Args:
        rank_model: The model; its tensors keep their dtype.
        model: The recipe's model.
        output: The folder.
        naming: Whose names the export has.
        tokenizer: Its files are written beside the tensors.

    Raises:
        ConfigError, CheckpointError: See `require_exportable`.
        DataError: The file system is full or may not be written.
    """
    require_exportable(model, output, naming)
    tensors = published_tensors(rank_model)
    if model.variant.traits.whole_model is not None:
        _write_whole(tensors, model, output, tokenizer)
        return
    if naming is Naming.PUBLISHED:
        config = published_config(model)
    else:
        vocab_size, image_token = _with_image_token(tensors, model.language.vocab_size)
        if hf_tower(model.vision).final_norm and not tower_of(model.vision).has_post_norm:
            _add_final_norm(tensors, model.vision.hidden_size)
        config = llava_config(model, vocab_size, image_token, tokens_per_view(model.vision))
    some = next(iter(tensors.values()))
    config["dtype"] = str(some.dtype).removeprefix("torch.")
    with new_folder(output) as partial:
        _write_weights(partial, _renamed(tensors, model, naming))
        _write_json(partial / CONFIG, config)
        _write_json(partial / PREPROCESSOR, preprocessor_config(model.vision))
        for name, content in ({} if tokenizer is None else tokenizer.files).items():
            (partial / name).write_bytes(content)


def _write_whole(
    tensors: dict[str, torch.Tensor], model: ModelConfig, output: Path, tokenizer: Tokenizer | None
) -> None:
    """A model that transformers has itself, under its names whatever naming is asked for: it has no others."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    renamed, config = whole_folder(tensors, model, tokenizer)
    with new_folder(output) as partial:
        _write_weights(partial, renamed)
        _write_json(partial / CONFIG, {**config, "dtype": dtype})
        for name, content in ({} if tokenizer is None else tokenizer.files).items():
            (partial / name).write_bytes(content)


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tensors, with a line or a bar on stderr of how far it is."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    with WorkProgress("export", total, "bytes") as progress:
        write_tensors(folder, tensors, progress=progress.at)


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
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
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


def _renamed(tensors: dict[str, torch.Tensor], model: ModelConfig, naming: Naming) -> dict[str, torch.Tensor]:
    """The tensors under the names, and in the shapes, that the naming has for them."""
    found = {}
    for name, tensor in tensors.items():
        ones = leading_ones(name, model) if naming is Naming.HUGGING_FACE else 0
        found[to_naming(name, naming, model)] = tensor.reshape((1,) * ones + tuple(tensor.shape))
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


def _with_image_token(tensors: dict[str, torch.Tensor], vocab_size: int) -> tuple[int, int]:
    """Lengthen the vocabulary by the image token, which Hugging Face's LLaVA looks up; returns its size and the id.

    New rows are the mean of all: their logit is the mean logit, never the largest, so generation cannot choose them.
    """
    padded = (vocab_size // VOCABULARY_MULTIPLE + 1) * VOCABULARY_MULTIPLE
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows = tensors[name]
            mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
            tensors[name] = torch.cat([rows, mean.expand(padded - vocab_size, -1)])
    return padded, vocab_size


def _add_final_norm(tensors: dict[str, torch.Tensor], width: int) -> None:
    """transformers' towers end in a norm that no selected feature passes; ours have none, so it is the identity."""
    like = tensors[f"{VISION_PREFIX}embeddings.patch_embedding.weight"]
    tensors[f"{VISION_PREFIX}post_layernorm.weight"] = like.new_ones(width)
    tensors[f"{VISION_PREFIX}post_layernorm.bias"] = like.new_zeros(width)


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """How a global view is made, for transformers: a plain bicubic resize, without padding or cropping."""
    size = {"height": vision.image_size, "width": vision.image_size}
    known = tower_of(vision).hugging_face
    return {
        "image_processor_type": "CLIPImageProcessor" if known is None else known.image_processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
