"""`export`: a run's newest checkpoint, of any layout, is gathered on one rank and written for others to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.convert.export import export_model, require_exportable, require_room
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.inference.ask.preparation import prepared_data
from megatron_deepstack.inference.loading import load_engine, require_checkpoint
from megatron_deepstack.inference.model_card import card_of_run
from megatron_deepstack.model.build import merge_adapters
from megatron_deepstack.parallel.groups import Groups, create_groups
from megatron_deepstack.planning.budget.footprint import weight_bytes
from megatron_deepstack.platform.processes.local_ranks import launch_ranks
from megatron_deepstack.platform.quantity import data_size
from megatron_deepstack.run_folder.recipe import recipe_of_run

_STOPPED = "export: stopped on request; {output} was not made. Run the same command again"


def export_run(
    run_dir: str | Path,
    output: str | Path,
    naming: Naming = Naming.PUBLISHED,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the newest whole checkpoint of a run into a new folder.

    This starts one rank, which holds the whole model in memory.

    Args:
        run_dir: The run folder.
        output: Folder to create.
        naming: Names of the tensors.
        overrides: Changes to the run's recipe, such as `data.tokenizer=...`.
        say: Called with a line about what is about to be done.

    Returns:
        `output` as a path.

    Raises:
        ConfigError: An override or the variant does not allow it. This and the next two are raised before the rank
            starts if they can be known by then.
        CheckpointError: There is no usable checkpoint.
        DataError: The tokenizer is missing, or `output` cannot be written.
        PreemptedError: It was asked to stop.
    """
    recipe = one_rank_recipe(run_dir, overrides)
    require_exportable(recipe.model, Path(output), naming)
    require_checkpoint(recipe)
    _tokenizer(recipe)
    size = weight_bytes(recipe)
    require_room(Path(output), size)
    say(f"export: {run_dir} -> {output}, about {data_size(size)}; one process starts and reads the checkpoint")
    launch_ranks(_export_on_new_rank, 1, recipe, str(output), naming, stopped=_STOPPED.format(output=output))
    return Path(output)


def one_rank_recipe(run_dir: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe a run was made with, for one rank; the run may have been moved since."""
    return replace(recipe_of_run(run_dir, overrides), parallel=ParallelConfig())


def export_on_rank(recipe: Recipe, output: str, naming: Naming, groups: Groups) -> None:
    """Load the checkpoint and write it. To be called on the only rank of `groups`."""
    tokenizer = _tokenizer(recipe)
    model = merge_adapters(load_engine(recipe, groups).model)
    about = About(data=prepared_data(recipe), seq_length=recipe.train.seq_length, card=card_of_run(recipe))
    export_model(model, recipe.model, Path(output), naming, tokenizer, about)


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


def _export_on_new_rank(recipe: Recipe, output: str, naming: Naming) -> None:
    from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.processes.process_group import join, leave

    adapt_megatron()
    join()
    export_on_rank(recipe, output, naming, create_groups(recipe.parallel, recipe.train.seed))
    leave()
