"""The verb `plan`, and the plan that `train` and `launch` show before they start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from math import log2
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_deepstack.cli.app import Overrides, RecipeArgument, app
from megatron_deepstack.cli.output import JsonOption, print_json
from megatron_deepstack.config.constraints import PathKind
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import ConfigError, DataError, LayoutError


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Plan the recipe's layout for this many processes.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Plan all layouts for this many GPUs.")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100 or b200.")] = "h100",
    store: Annotated[
        str | None, PathKind.LOCATION, typer.Option(help="Take lengths from this store instead of the recipe's.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the stages as a drawing to this file too.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write the predicted timeline as a drawing to this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show stages and stacks, memory, time and whether it fits; with --gpus all layouts. Starts nothing."""
    from megatron_deepstack.planning.budget.hardware import machine_named
    from megatron_deepstack.planning.check import check_world, load_checked_recipe, model_ranks
    from megatron_deepstack.report.plan_text import plan_table

    loaded = load_checked_recipe(recipe, overrides or ())
    machine = machine_named(gpu)
    if store is not None:
        _require_store(store)
    if ranks is not None and ranks < 1:
        raise ConfigError([f"--ranks: found {ranks}; the nearest that works is {model_ranks(loaded.parallel)}"])
    if gpus is not None:
        _all_layouts(loaded, gpus, gpu, store, as_json)
        return
    num_ranks = model_ranks(loaded.parallel) if ranks is None else ranks
    check_world(loaded, num_ranks)
    if not as_json:
        Console().print(plan_table(loaded, Console().width))
    values = _estimate(loaded, store, machine, num_ranks, timeline, as_json)
    if as_json:
        from megatron_deepstack.report.plan_document import plan_document

        print_json({**plan_document(loaded, num_ranks), "estimate": values})
    if svg is not None:
        from megatron_deepstack.report.drawing.stages import stage_drawing

        _write(svg, "--svg", stage_drawing(loaded) + "\n")


def _estimate(
    loaded: Recipe, store: str | None, machine: Any, num_ranks: int, timeline: Path | None, as_json: bool
) -> dict[str, object]:
    """Print the estimate of the recipe's own layout, and return it for programs."""
    from megatron_deepstack.planning.budget.run_plan import advice, plan_run
    from megatron_deepstack.report.plan_estimate import estimate, plan_values, predicted_step

    shapes = _shapes(loaded, store)
    found = plan_run(loaded, shapes, machine, num_ranks)
    knob = "" if found.fits else advice(found, shapes)
    if not as_json:
        Console().print(estimate(found, knob, Console().width))
    if timeline is not None:
        from megatron_deepstack.report.drawing.timeline import timeline_drawing

        _write(timeline, "--timeline", timeline_drawing(predicted_step(found)) + "\n")
    return plan_values(found, knob)


def _all_layouts(loaded: Recipe, gpus: int, gpu: str, store: str | None, as_json: bool) -> None:
    from megatron_deepstack.planning.budget.hardware import machine_named
    from megatron_deepstack.planning.budget.layouts import all_layouts
    from megatron_deepstack.report.plan_estimate import layouts_table, layouts_values, side_by_side

    if gpus < 1:
        raise ConfigError([f"--gpus: found {gpus}, expected 1 or more; the nearest that works is --gpus 1"])
    found = all_layouts(loaded, _shapes(loaded, store), machine_named(gpu), gpus)
    if as_json:
        print_json({"name": loaded.name, "gpus": gpus, **layouts_values(found, gpus)})
        return
    console = Console()
    console.print(layouts_table(found, gpus))
    if len(found.fitting) > 1:
        console.print(side_by_side(found.fitting[:3]))
    if not found.fitting:
        raise LayoutError([f"--gpus {gpus}: {_nearest(loaded, gpus, gpu, store)}"])


def _nearest(loaded: Recipe, gpus: int, gpu: str, store: str | None) -> str:
    """Name the nearest number of GPUs on which a layout fits."""
    from megatron_deepstack.planning.budget.hardware import machine_named
    from megatron_deepstack.planning.budget.layouts import any_layout_fits
    from megatron_deepstack.planning.budget.load import StepLoads

    loads = StepLoads(loaded.model, loaded.train, _shapes(loaded, store))
    powers = [1 << power for power in range(13)]
    for number in sorted(powers, key=lambda one: (abs(log2(one / gpus)), -one)):
        if number != gpus and any_layout_fits(loaded, loads, machine_named(gpu), number):
            return f"no layout fits; the nearest number on which one does is {number} of {gpu}"
    most = powers[-1]
    return f"no layout fits on up to {most} of {gpu}; try lora.rank=16, a shorter train.seq_length, or a larger GPU"


def _require_store(path: str) -> None:
    """Raise ConfigError if a store that was asked for is not there; name the nearest one beside it."""
    if "://" in path or Path(path).exists():
        return
    folder = Path(path).parent
    beside = sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    near = get_close_matches(Path(path).name, beside, n=1, cutoff=0.5)
    nearest = f"did you mean {folder / near[0]}?" if near else "make it with `megatron-deepstack preprocess`."
    raise ConfigError(
        [f"--store {path}: no such folder; {nearest} Without --store the recipe's stated lengths are used"]
    )


def _shapes(loaded: Recipe, store: str | None) -> Any:
    """Sizes of samples: of the store where it is there, else as the recipe states them."""
    from megatron_deepstack.planning.budget.drawn import drawn_shapes

    data = loaded.data
    if store is not None:
        data = replace(data, store=store, stores=None, weights=None)
    paths = data.stores or ((data.store,) if data.store else ())
    there = [path for path in paths if "://" in path or Path(path).exists()]
    if not paths or (store is None and len(there) < len(paths)):
        drawn = drawn_shapes(loaded)
        missing = [path for path in paths if path not in there]
        return replace(drawn, source=f"{drawn.source}; not there yet: {missing[0]}") if missing else drawn
    from megatron_deepstack.data.order.stored_shapes import stored_shapes

    return stored_shapes(replace(loaded, data=data))


def _write(file: Path, option: str, text: str) -> None:
    from megatron_deepstack.platform.files.write_whole import write_result

    try:
        write_result(file, text)
    except OSError as error:
        raise DataError(f"{option} {file}: cannot be written: {error.strerror}") from error


def show_before_start(loaded: Recipe, num_ranks: int, anyway: bool, tell: Callable[[str], None]) -> None:
    """Print the plan of a run in three lines, and refuse it if its ranks have too little memory.

    Args:
        loaded: The recipe.
        num_ranks: Number of ranks that will be started.
        anyway: Start it in any case.
        tell: Prints a line.

    Raises:
        LayoutError: It does not fit this machine's GPUs; the message says what would.
    """
    from megatron_deepstack.planning.budget.hardware import machine_of_device
    from megatron_deepstack.planning.budget.run_plan import advice, plan_run
    from megatron_deepstack.platform.compute import gpu_model
    from megatron_deepstack.report.plan_estimate import refusal, three_lines

    shapes = _shapes(loaded, None)
    found = plan_run(loaded, shapes, machine_of_device(gpu_model.gpu_model() or "cpu"), num_ranks)
    tell(three_lines(found))
    if not found.fits and not anyway:
        raise LayoutError([refusal(found, advice(found, shapes))])


def show_dry_run(
    recipe: str, overrides: list[str], world: int | None, ranks: list[int], tell: Callable[[str], None]
) -> None:
    """Build some ranks of a world and plan a step; print each part's time and memory.

    Args:
        recipe: A YAML file, or the name of a recipe of the package.
        overrides: Each `section.field=value`.
        world: Number of ranks in all; one replica's if None.
        ranks: Ranks to build; the first and the last if empty.
        tell: Prints a line.

    Raises:
        DeepStackError: The recipe has problems, or the world or a rank does not fit.
    """
    from megatron_deepstack.planning.budget.hardware import H100
    from megatron_deepstack.planning.budget.run_plan import plan_run
    from megatron_deepstack.planning.check import load_checked_recipe, model_ranks
    from megatron_deepstack.training.dry_run import dry_run

    loaded = load_checked_recipe(recipe, overrides)
    size = model_ranks(loaded.parallel) if world is None else world
    shapes = _shapes(loaded, None)
    planning: dict[int, float] = {}
    for part in dry_run(loaded, size, tuple(ranks) or tuple(sorted({0, max(size - 1, 0)})), shapes):
        grown = f"{part.grown_bytes / 1e6:8.1f} MB more memory"
        tell(f"rank {part.rank:>5}  {part.name:20} {part.seconds:8.3f} s  {grown}  {part.note}".rstrip())
        if part.name.startswith(("deal", "plan")):
            planning[part.rank] = planning.get(part.rank, 0.0) + part.seconds
    seconds = plan_run(loaded, shapes, H100, size).seconds.total
    slowest = max(planning.values())
    tell(
        f"planning a step: {slowest:.3f} s of CPU time on the slowest of these ranks, {slowest / seconds:.1%} of the "
        f"{seconds:.3g} s a step predicted on {size} x h100; it runs beside the step before. Lengths: {shapes.source}"
    )
