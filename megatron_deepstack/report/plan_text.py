"""The stage plan in a terminal: which stage holds which layers, and which stack enters before which layer."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, digits

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import Chunk, decoder_slots, stage_chunks

_MARKS = digits + ascii_lowercase
_NARROW = 60
"""The smallest width in which the table is readable."""
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


def plan_table(recipe: Recipe, width: int = 100) -> RenderableType:
    """One row per chunk of the pipeline, its layers drawn as a strip with the stacks marked.

    Args:
        recipe: A recipe whose layout has been checked.
        width: Columns of the terminal. If a table would not fit, each chunk becomes a few lines.

    Returns:
        Something that rich can print.
    """
    slots = decoder_slots(recipe.model)
    title = Text(f"Stage plan of {recipe.name}", style="table.title")
    if width < _NARROW:
        lines = [line for chunk in _chunks(recipe) for line in _narrow(chunk, recipe, slots)]
        return Group(title, *lines, Text(_legend(recipe, slots), style="dim"))
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading in ("stage", "layers", "stacks added before", "holds", "strip"):
        table.add_column(heading, overflow="fold")
    for chunk in _chunks(recipe):
        table.add_row(
            _stage(chunk, recipe.parallel.virtual_pipeline),
            _layers(chunk),
            _stacks(chunk, slots),
            _ends(chunk),
            _strip(chunk, slots),
        )
    return Group(table, Text(_legend(recipe, slots), style="dim"))


def _chunks(recipe: Recipe) -> Sequence[Chunk]:
    return stage_chunks(recipe.model.language.num_layers, recipe.parallel)


def _narrow(chunk: Chunk, recipe: Recipe, slots: Sequence[int]) -> list[Text]:
    """A chunk without a table."""
    layers = _layers(chunk)
    layers = "no layers" if layers == "none" else f"layer {layers}" if layers.isdigit() else f"layers {layers}"
    lines = [Text(f"stage {_stage(chunk, recipe.parallel.virtual_pipeline)}: {layers}", style="bold")]
    lines += [Text(f"  stacks {_stacks(chunk, slots)}")] if _stacks(chunk, slots) != "-" else []
    lines += [Text(f"  holds {_ends(chunk)}")] if _ends(chunk) != "-" else []
    return [*lines, Text("  ").append_text(_strip(chunk, slots))]


def _stage(chunk: Chunk, virtual_pipeline: int) -> str:
    return f"{chunk.pp}" if virtual_pipeline == 1 else f"{chunk.pp}, chunk {chunk.vpp}"


def _layers(chunk: Chunk) -> str:
    if chunk.stop == chunk.first:
        return "none"
    return f"{chunk.first}" if chunk.stop == chunk.first + 1 else f"{chunk.first} to {chunk.stop - 1}"


def _stacks(chunk: Chunk, slots: Sequence[int]) -> str:
    own = [f"{stack} at {slot}" for stack, slot in enumerate(slots) if chunk.first <= slot < chunk.stop]
    return ", ".join(own) or "-"


def _ends(chunk: Chunk) -> str:
    held = [name for name, held in (("embedding", chunk.has_embedding), ("head", chunk.has_head)) if held]
    return ", ".join(held) or "-"


def _strip(chunk: Chunk, slots: Sequence[int]) -> Text:
    """One character per layer: a dot, the number of the stack that enters before it, or a star for several."""
    strip = Text("E" if chunk.has_embedding else "", style="bold")
    for layer in range(chunk.first, chunk.stop):
        own = [stack for stack, slot in enumerate(slots) if slot == layer]
        if not own:
            strip.append("·", style="dim")
        elif len(own) > 1 or own[0] >= len(_MARKS):
            strip.append("*", style="bold")
        else:
            strip.append(_MARKS[own[0]], style=f"bold {_COLOURS[own[0] % len(_COLOURS)]}")
    return strip


def _legend(recipe: Recipe, slots: Sequence[int]) -> str:
    base = "with the global view's tokens" if recipe.model.variant.traits.has_base_rows else "with zeros for images"
    lines = [f"E embedding {base}, · layer, 0 1 2 ... layer with that stack, * with several"]
    if not slots:
        lines = [f"{recipe.model.variant} adds no stacks to the decoder; E embedding, · layer"]
    if recipe.model.variant.traits.stacks_in_vit:
        plan = plan_vit_stacks(recipe.model)
        dropped = "".join(f", stack {stack} finds no layer" for stack in plan.dropped)
        lines.append(f"in the ViT, stacks enter before layers {', '.join(map(str, plan.slots))}{dropped}")
    return "\n".join(lines)
