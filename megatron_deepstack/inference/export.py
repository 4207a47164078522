"""`export`: a run's newest checkpoint, of any layout, is gathered on one rank and written for others to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import torch

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.convert.adapters import adapters_of, module_name, write_adapters
from megatron_deepstack.convert.export import (
    export_model,
    new_folder,
    published_tensors,
    require_exportable,
    require_room,
)
from megatron_deepstack.convert.export_files import CARD, About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.inference.ask.preparation import prepared_data
from megatron_deepstack.inference.loading import load_engine, require_checkpoint
from megatron_deepstack.inference.model_card import card_of_run
from megatron_deepstack.model.build import RankModel, drop_adapters, merge_adapters
from megatron_deepstack.model.weights import PROJECTOR_PREFIX
from megatron_deepstack.parallel.groups import Groups, create_groups
from megatron_deepstack.planning.budget.footprint import weight_bytes
from megatron_deepstack.planning.budget.parameters import adapter_parameters
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.platform.quantity import data_size
from megatron_deepstack.run_folder.recipe import recipe_of_run


class Adapters(StrEnum):
    """What becomes of a run's LoRA adapters in its export."""

    MERGED = "merged"
    """They are added to the weights that they stand beside."""
    LEFT_OUT = "left_out"
    """The weights are as they were; everything else is as the run trained it."""
    ALONE = "alone"
    """They are all that is written, for PEFT, and belong to the export without them."""


_ADAPTER_BYTES = 4
_STOPPED = "export: stopped on request; {output} was not made. Run the same command again"


def export_run(
    run_dir: str | Path,
    output: str | Path,
    naming: Naming = Naming.PUBLISHED,
    overrides: Sequence[str] = (),
    *,
    adapters: Adapters = Adapters.MERGED,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the newest whole checkpoint of a run into a new folder.

    This starts one rank, which holds the whole model in memory.

    Args:
        run_dir: The run folder.
        output: Folder to create.
        naming: Names of the tensors.
        overrides: Changes to the run's recipe, such as `data.tokenizer=...`.
        adapters: What becomes of LoRA adapters.
        say: Called with a line about what is about to be done.

    Returns:
        `output` as a path.

    Raises:
        ConfigError: An override or the variant does not allow it, or the run has no adapters. This and the next two are
            raised before the rank starts if they can be known by then.
        CheckpointError: There is no usable checkpoint.
        DataError: The tokenizer is missing, or `output` cannot be written.
        PreemptedError: It was asked to stop.
    """
    recipe = one_rank_recipe(run_dir, overrides)
    require_exportable(recipe.model, Path(output), naming)
    if adapters is not Adapters.MERGED and not recipe.lora.rank:
        raise ConfigError([f"--adapters {adapters}: {run_dir} was trained without LoRA (lora.rank is 0); leave it out"])
    require_checkpoint(recipe)
    _tokenizer(recipe)
    alone = adapters is Adapters.ALONE
    size = _ADAPTER_BYTES * adapter_parameters(recipe) if alone else weight_bytes(recipe)
    require_room(Path(output), size)
    say(f"export: {run_dir} -> {output}, about {data_size(size)}; one process starts and reads the checkpoint")
    if alone:
        say(_what_belongs_to_them(recipe, naming))
    launch_ranks(_export_on_new_rank, 1, recipe, str(output), naming, adapters, stopped=_STOPPED.format(output=output))
    return Path(output)


def one_rank_recipe(run_dir: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was made with, for one rank. The run may have been moved since.

    Args:
        run_dir: The run folder.
        overrides: Changes to the recipe, such as `data.tokenizer=...`.

    Returns:
        The recipe, with a layout of one rank.

    Raises:
        ConfigError: There is no run in that folder, or an override is wrong.
    """
    return replace(recipe_of_run(run_dir, overrides), parallel=ParallelConfig())


def _what_belongs_to_them(recipe: Recipe, naming: Naming) -> str:
    """What a user of adapters alone needs beside them."""
    adapted = {Part.LANGUAGE: True, Part.VISION: recipe.lora.vision_targets, Part.PROJECTOR: recipe.lora.projector}
    others = [str(part) for part in sorted(recipe.train.trainable) if not adapted[part]]
    trained = f", in which {' and '.join(others)} are as this run trained them" if others else ""
    return f"export: they belong to the folder that `export --naming {naming} --adapters left_out` writes{trained}"


def export_on_rank(
    recipe: Recipe, output: str, naming: Naming, groups: Groups, adapters: Adapters = Adapters.MERGED
) -> None:
    """Load the checkpoint and write it. Call it on the only rank of `groups`.

    Args:
        recipe: The run's recipe, with a layout of one rank.
        output: Folder to create.
        naming: Names of the tensors.
        groups: Those of a world of one rank.
        adapters: What becomes of LoRA adapters.

    Raises:
        CheckpointError, DataError: See `export_run`.
    """
    model = load_engine(recipe, groups).model
    card = card_of_run(recipe)
    if adapters is Adapters.ALONE:
        write_adapters_alone(model, recipe, Path(output), naming, card)
        return
    model = merge_adapters(model) if adapters is Adapters.MERGED else drop_adapters(model)
    about = About(data=prepared_data(recipe), seq_length=recipe.train.seq_length, card=card)
    export_model(model, recipe.model, Path(output), naming, _tokenizer(recipe), about)


def write_adapters_alone(
    model: RankModel, recipe: Recipe, output: Path, naming: Naming, card: Sequence[str] = ()
) -> None:
    """Write a model's adapters into a new folder, as PEFT reads them. Not collective.

    The linears of a projector that learned beside them are in the folder too, as modules that PEFT replaces.

    Args:
        model: The whole model, on this rank.
        recipe: The run's recipe.
        output: Folder to create.
        naming: Names of the modules; those of the export to which the adapters belong.
        card: Paragraphs of the model card.

    Raises:
        DataError: `output` cannot be written.
    """
    found = [replace(one, module=module_name(one.module, naming, recipe.model)) for one in adapters_of(model)]
    whole = _learned_projector(model, recipe)
    renamed = {module_name(name, naming, recipe.model): tensor for name, tensor in whole.items()}
    tags = "---\nlibrary_name: peft\ntags:\n- lora\n---"
    title = f"# LoRA adapters of a model of variant {recipe.model.variant}"
    made = (
        "Trained with megatron-deepstack. They belong to the folder that its `export` wrote of the same run with "
        f"`--naming {naming} --adapters left_out`:"
    )
    example = "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, FOLDER)\n```"
    with new_folder(output) as folder:
        write_adapters(folder, found, whole=renamed)
        (folder / CARD).write_text("\n\n".join([tags, title, made, example, *card]) + "\n", encoding="utf-8")


def _learned_projector(model: RankModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Tensors of a projector that learned, by published names; none if it holds more than linears and norms."""
    if Part.PROJECTOR not in recipe.train.trainable or recipe.lora.projector:
        return {}
    tensors = published_tensors(drop_adapters(model))
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTOR_PREFIX)}
    return found if all(name.endswith((".weight", ".bias")) for name in found) else {}


def _tokenizer(recipe: Recipe) -> Tokenizer | None:
    path = recipe.data.tokenizer
    if path is None:
        return None
    if not Path(path).exists():
        raise DataError(
            f"data.tokenizer: {Path(path).absolute()} is not there, and belongs into the export; restore it, or name "
            "another place of it with data.tokenizer=PATH behind the output folder"
        )
    return load_tokenizer(path)


def _export_on_new_rank(recipe: Recipe, output: str, naming: Naming, adapters: Adapters) -> None:
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    export_on_rank(recipe, output, naming, create_groups(recipe.parallel, recipe.train.seed), adapters)
    leave()
