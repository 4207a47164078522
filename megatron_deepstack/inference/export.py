"""`export`: a run's newest checkpoint, of any layout, gathered on one rank and written for others to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.run_folder import RECIPE_FILE, RunFolder
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.convert.export import export_model, require_exportable
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, DataError
from megatron_deepstack.inference.main import load_engine
from megatron_deepstack.model.build import merge_adapters
from megatron_deepstack.parallel.groups import Groups, create_groups
from megatron_deepstack.platform.local_ranks import launch_ranks


def export_run(run_dir: str | Path, output: str | Path, naming: Naming = Naming.PUBLISHED) -> Path:
    """Write the newest whole checkpoint of `run_dir` into the new folder `output`, and return it.

    Starts one rank of its own, which holds the whole model in memory. Raises ConfigError, CheckpointError, DataError.
    """
    recipe = one_rank_recipe(run_dir)
    require_exportable(recipe.model, Path(output), naming)
    launch_ranks(_export_on_new_rank, 1, recipe, str(output), naming)
    return Path(output)


def one_rank_recipe(run_dir: str | Path) -> Recipe:
    """The recipe a run was made with, for one rank; the run may lie elsewhere by now."""
    file = RunFolder(run_dir).recipe
    if not file.is_file():
        raise CheckpointError(f"{run_dir}: holds no {RECIPE_FILE}; name the folder of a run")
    return replace(load_recipe(file), run_dir=str(run_dir), parallel=ParallelConfig())


def export_on_rank(recipe: Recipe, output: str, naming: Naming, groups: Groups) -> None:
    """Load and write on the only rank of `groups`."""
    path = recipe.data.tokenizer
    if path is not None and not Path(path).exists():
        raise DataError(f"data.tokenizer: {path} is not there, and belongs into the export; restore it")
    tokenizer = None if path is None else load_tokenizer(path)
    model = merge_adapters(load_engine(recipe, groups).model)
    export_model(model, recipe.model, Path(output), naming, tokenizer)


def _export_on_new_rank(recipe: Recipe, output: str, naming: Naming) -> None:
    from megatron_deepstack.platform.megatron_cpu import adapt_megatron
    from megatron_deepstack.platform.process_group import join, leave

    adapt_megatron()
    join()
    export_on_rank(recipe, output, naming, create_groups(recipe.parallel, recipe.train.seed))
    leave()
