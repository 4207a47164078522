"""`convert --to checkpoint`: a folder of weights into a run folder with one checkpoint, which is of step 0.

`train` begins from it with any layout, and `generate`, `ask` and `export` read it, as if a run had just started. One
process plans and writes it; tensors are read and written one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_deepstack.checkpoint.saving.weights_alone import write_weights
from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.problems import raise_problems
from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.config.schema import DataConfig, ModelConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.convert.export import new_folder, require_absent, require_room
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.published import published_source, starting_weights
from megatron_deepstack.convert.vocabulary import require_rows
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.build import build_model
from megatron_deepstack.model.published_shapes import decoder_shapes, shapes_of
from megatron_deepstack.parallel.groups import Groups, create_groups
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.platform.progress import WorkProgress
from megatron_deepstack.platform.quantity import data_size, number_of
from megatron_deepstack.run_folder.recipe import record_start_folder
from megatron_deepstack.run_folder.starting_weights import write_starting_weights

_STOPPED: Final = "convert: stopped on request; {target} was not made. Run the same command again"
_SHOWN: Final = 6
"""Names that a message lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What a folder of weights holds."""

    model: ModelConfig
    data: DataConfig
    seq_length: int | None
    tokenizer: Path | None
    left_over: tuple[str, ...]
    dtypes: Mapping[torch.dtype, int]
    """Number of tensors of each dtype."""
    num_bytes: int
    largest_bytes: int


def checkpoint_of_folder(
    source: str | Path, target: str | Path, *, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write a folder of weights as the first checkpoint of a new run folder.

    This starts one process. Its memory is bounded by the largest parameter, not by the model.

    Args:
        source: A folder that `convert` reads, or one of a whole model of transformers, such as Qwen3-VL.
        target: Run folder to create. Its recipe holds what the folder says: the model, how data is prepared, and the
            precision of the weights.
        say: Called with lines about what is found.

    Returns:
        `target` as a path.

    Raises:
        CheckpointError: `source` holds no whole model of ours, or `target` exists.
        ConfigError: A recipe cannot describe the model.
        DataError: `target` cannot be written, or the tokenizer cannot be read.
        PreemptedError: It was asked to stop.
    """
    source, target = Path(source), Path(target)
    require_absent(target)
    found = _read(source)
    recipe = _recipe(found, target)
    precision = recipe.train.precision
    size = found.num_bytes * (4 // _bytes(found) if precision is Precision.FP32 else 1)
    say(
        f"convert: {source} -> {target}, a checkpoint of about {data_size(size)} in {precision}, one parameter at a "
        f"time (the largest tensor: {data_size(found.largest_bytes)})"
    )
    if found.left_over:
        shown = ", ".join(found.left_over[:_SHOWN]) + (", ..." if len(found.left_over) > _SHOWN else "")
        say(f"left out, since the model does not use them: {number_of(len(found.left_over), 'tensor')}: {shown}")
    if found.tokenizer is None:
        say(f"{source} holds no tokenizer; name one with data.tokenizer=PATH when you use {target}")
    require_room(target, size)
    tokenizer = None if found.tokenizer is None else load_tokenizer(found.tokenizer)
    if tokenizer is not None:
        require_rows(tokenizer, found.model.language.vocab_size, str(source))
    with new_folder(target) as folder:
        launch_ranks(_write_on_new_rank, 1, recipe, str(source), str(folder), stopped=_STOPPED.format(target=target))
        for name, content in ({} if tokenizer is None else tokenizer.files).items():
            (folder / name).write_bytes(content)
        record_start_folder(folder)
        RunFolder(folder).recipe.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    return target


def _bytes(found: _Found) -> int:
    return min(4, max(dtype.itemsize for dtype in found.dtypes))


def _read(source: Path) -> _Found:
    folder = read_exported(source)
    tensors = list(folder.tensors.values())
    dtypes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    return _Found(
        model=folder.model,
        data=folder.data,
        seq_length=folder.seq_length,
        tokenizer=folder.tokenizer,
        left_over=folder.left_over,
        dtypes=dtypes,
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        largest_bytes=max(tensor.num_bytes for tensor in tensors),
    )


def recipe_of_folder(source: Path, target: Path) -> Recipe:
    """The recipe of the run folder that a folder of weights becomes.

    Args:
        source: See `checkpoint_of_folder`.
        target: The run folder, which need not exist.

    Returns:
        The recipe.

    Raises:
        CheckpointError, ConfigError: See `checkpoint_of_folder`.
    """
    return _recipe(_read(source), target)


def _precision(found: _Found) -> Precision:
    """One that holds every tensor exactly."""
    return Precision.BF16 if set(found.dtypes) == {torch.bfloat16} else Precision.FP32


def _recipe(found: _Found, target: Path) -> Recipe:
    train = replace(TrainConfig(), precision=_precision(found))
    if found.seq_length is not None:
        train = replace(train, seq_length=found.seq_length)
    data = found.data
    if found.tokenizer is not None:
        data = replace(data, tokenizer=str(target / found.tokenizer.name))
    recipe = Recipe(name=target.name, run_dir=str(target), model=found.model, data=data, train=train)
    raise_problems([problem for problem in find_problems(recipe) if problem.concerns("model")])
    return recipe


def write_on_rank(recipe: Recipe, source: str, folder: str, groups: Groups) -> None:
    """Write the checkpoint, and the list of where its tensors come from. Call it on the only rank of `groups`.

    Args:
        recipe: The recipe of the run folder, see `recipe_of_folder`.
        source: The folder of weights.
        folder: Where the run folder is written.
        groups: Those of a world of one rank.

    Raises:
        CheckpointError: The folder lacks a tensor, or a file is damaged.
        OSError: The disk refuses.
    """
    with FakeTensorMode():
        model = build_model(recipe.model, ParallelConfig(), recipe.train.precision, groups)
    read = published_source(source, model=recipe.model)
    shapes = {**shapes_of([model.encoder_rules]), **decoder_shapes(recipe.model)}
    missing = [name for name in shapes if read.origin(name) is None]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise CheckpointError(f"{source}: {number_of(len(missing), 'tensor')} of the model are missing: {shown}")
    modules: list[torch.nn.Module] = [model.encoder, *model.chunks]
    total = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    with WorkProgress("convert", total, "bytes") as progress:
        write_weights(replace(recipe, run_dir=folder), recipe_to_yaml(recipe), model, read.stored, progress.at)
    write_starting_weights(folder, starting_weights(shapes, read))


def _write_on_new_rank(recipe: Recipe, source: str, folder: str) -> None:
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    write_on_rank(recipe, source, folder, create_groups(ParallelConfig(), recipe.train.seed))
    leave()
