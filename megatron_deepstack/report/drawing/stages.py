"""An SVG drawing of how stacks reach pipeline stages: the mosaic of crops, the stacks taken from it, the layers.

It is drawn from the recipe by the same functions that plan the run, so the drawing cannot contradict the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_deepstack.config.choices import Sampler
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.exchange.samplers import SAMPLERS, stack_of_token
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import EMBEDDING, Chunk, decoder_slots, stage_chunks
from megatron_deepstack.report.drawing.svg import (
    FAINT,
    INK,
    LINE,
    PAPER,
    Markup,
    drawing,
    element,
    joined,
    rect,
    stack_colour,
    text,
)

_WIDTH = 960.0
_MARGIN = 20.0
_TILE = 92.0
_IMAGES_Y = 40.0
_GLOBAL = "#52606d"
"""Colour of the global view and its tokens."""


@dataclass(frozen=True, slots=True)
class _Box:
    """One box of layers: a pipeline chunk, or the ViT."""

    labels: tuple[str, ...]
    """Lines below the box."""
    first: int
    stop: int
    has_embedding: bool
    has_head: bool

    @property
    def num_cells(self) -> int:
        return self.stop - self.first + int(self.has_embedding) + int(self.has_head)


@dataclass(frozen=True, slots=True)
class _Row:
    """Boxes side by side, and the position of each layer's cell."""

    markup: Markup
    centre: dict[int, float]
    """The middle of each layer's cell, by layer number; that of the embedding under EMBEDDING."""
    top: float


def stage_drawing(recipe: Recipe) -> Markup:
    """The whole drawing: views and stacks above, stages below, a curve from each stack to the layer of its slot."""
    in_vit = recipe.model.variant.traits.stacks_in_vit
    slots = plan_vit_stacks(recipe.model).slots if in_vit else decoder_slots(recipe.model)
    parts: list[Markup] = []
    stages_y = 380.0 if in_vit else 240.0
    stages = _row([_stage_box(chunk, recipe) for chunk in _chunks(recipe)], slots if not in_vit else (), stages_y)
    target = stages
    if in_vit:
        vit = _Box(("ViT, on every rank",), 0, recipe.model.vision.num_layers, False, False)
        target = _row([vit], slots, 240.0)
        last = max(target.centre.values())
        parts += [target.markup, _curve(last, target.top + 62, stages.centre[EMBEDDING], stages.top, _GLOBAL)]
    else:
        parts.append(_curve(_MARGIN + _TILE / 2, _IMAGES_Y + _TILE + 22, stages.centre[EMBEDDING], stages.top, _GLOBAL))
    parts += [_stack(stack, slot, len(slots), target) for stack, slot in enumerate(slots)]
    head = _images(recipe, has_stacks=bool(slots))
    height = stages.top + 140
    paper = rect(0, 0, _WIDTH, height, fill=PAPER)
    title = f"{recipe.name}: stage plan with {len(slots)} stacks"
    return drawing(_WIDTH, height, title, paper, head, *parts, stages.markup, _caption(recipe, slots, height))


def _chunks(recipe: Recipe) -> tuple[Chunk, ...]:
    return stage_chunks(recipe.model.language.num_layers, recipe.parallel)


def _stage_box(chunk: Chunk, recipe: Recipe) -> _Box:
    labels = [f"stage {chunk.pp}"]
    if recipe.parallel.virtual_pipeline > 1:
        labels.append(f"chunk {chunk.vpp}")
    return _Box(tuple(labels), chunk.first, chunk.stop, chunk.has_embedding, chunk.has_head)


def _images(recipe: Recipe, *, has_stacks: bool) -> Markup:
    """The global view, and beside it the crops as a mosaic of token cells in their stack's colour."""
    parts = [
        text(_MARGIN + _TILE / 2, _IMAGES_Y - 12, "global view", size=13),
        rect(_MARGIN, _IMAGES_Y, _TILE, _TILE, fill=_GLOBAL, fill_opacity=0.12, stroke=_GLOBAL),
        *_page(_MARGIN, _IMAGES_Y),
        text(_MARGIN + _TILE / 2, _IMAGES_Y + _TILE + 16, "base tokens", size=11, fill=FAINT),
    ]
    if has_stacks:
        left = _MARGIN + _TILE + 36
        parts.append(text(left + _TILE / 2, _IMAGES_Y - 12, "crops, as a mosaic", size=13))
        parts += _mosaic(recipe.model.stacks.sampler, left, _IMAGES_Y)
        note = SAMPLERS[recipe.model.stacks.sampler].note
        parts.append(text(left + _TILE / 2, _IMAGES_Y + _TILE + 16, note, size=11, fill=FAINT))
        parts.append(_arrow(left + _TILE + 10, _IMAGES_Y + _TILE / 2, left + _TILE + 42))
    return joined(*parts)


def _page(x: float, y: float) -> list[Markup]:
    """A sign for a document: blurred lines, as the global view shows them."""
    widths = (0.62, 0.74, 0.4, 0.7, 0.55)
    return [
        rect(x + 12, y + 14 + 14 * index, _TILE * width, 6, fill=_GLOBAL, fill_opacity=0.35, rx=3)
        for index, width in enumerate(widths)
    ]


def _mosaic(sampler: Sampler, x: float, y: float) -> list[Markup]:
    """A 2x2 grid of crops, 4x4 tokens each, each token in the colour of the stack that takes it."""
    stacks = stack_of_token(sampler, 4, (2, 2)).tolist()
    gap = 6.0
    cell = (_TILE - gap) / len(stacks)
    parts = []
    for row, stacks_of_row in enumerate(stacks):
        for column, stack in enumerate(stacks_of_row):
            left, top = x + column * cell + column // 4 * gap, y + row * cell + row // 4 * gap
            parts.append(rect(left, top, cell - 1, cell - 1, fill=stack_colour(stack)))
    return parts


def _arrow(x: float, y: float, to: float) -> Markup:
    head = element("path", d=f"M{to - 7:.1f},{y - 5:.1f} L{to:.1f},{y:.1f} L{to - 7:.1f},{y + 5:.1f}", fill="none")
    return element("g", element("line", x1=x, x2=to, y1=y, y2=y), head, stroke=FAINT, stroke_width=1.5)


def _stack(stack: int, slot: int, num_stacks: int, row: _Row) -> Markup:
    """A stack's tile, and the curve to the layer before which it is added."""
    left = _MARGIN + 2 * _TILE + 90
    pitch = min(150.0, (_WIDTH - _MARGIN - left) / num_stacks)
    size = min(64.0, pitch * 0.8)
    x, y, colour = left + stack * pitch, _IMAGES_Y + (_TILE - size) / 2, stack_colour(stack)
    layers = max(layer for layer in row.centre if layer != EMBEDDING)
    parts = [rect(x, y, size, size, fill=colour, fill_opacity=0.25, stroke=colour, stroke_width=1.5, rx=3)]
    if size >= 14:
        parts.append(text(x + size / 2, y + size / 2 + 5, f"{stack}", size=min(16, size * 0.7), font_weight="bold"))
    if size >= 40:
        parts.append(text(x + size / 2, _IMAGES_Y - 12, f"stack {stack}", size=13))
        parts.append(text(x + size / 2, _IMAGES_Y + _TILE + 16, f"slot {slot}", size=11, fill=FAINT))
    below = _IMAGES_Y + _TILE + 22 if size >= 40 else y + size
    if slot <= layers:
        parts.append(_curve(x + size / 2, below, row.centre[slot], row.top, colour))
    return joined(*parts)


def _curve(x: float, y: float, to_x: float, to_y: float, colour: str) -> Markup:
    middle = (y + to_y) / 2
    path = f"M{x:.1f},{y:.1f} C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y - 6:.1f}"
    tip = f"M{to_x - 4:.1f},{to_y - 8:.1f} L{to_x:.1f},{to_y - 1:.1f} L{to_x + 4:.1f},{to_y - 8:.1f} Z"
    line = element("path", d=path, fill="none", stroke=colour, stroke_width=2, stroke_opacity=0.8)
    return joined(line, element("path", d=tip, fill=colour))


def _row(boxes: Sequence[_Box], slots: Sequence[int], y: float) -> _Row:
    """Boxes with cells of equal width over the whole width of the drawing."""
    gap, padding = 10.0, 5.0
    num_cells = sum(max(box.num_cells, 1) for box in boxes)
    cell = (_WIDTH - 2 * _MARGIN - gap * (len(boxes) - 1) - 2 * padding * len(boxes)) / num_cells
    parts, centre, x = [], {}, _MARGIN
    for box in boxes:
        width = cell * max(box.num_cells, 1) + 2 * padding
        parts.append(rect(x, y, width, 62, fill="#f5f7fa", stroke=LINE, rx=6))
        parts += [_label(x, y + 80 + 15 * line, width, label) for line, label in enumerate(box.labels)]
        for name, position in _cells(box):
            middle = x + padding + (position + 0.5) * cell
            if isinstance(name, int):
                centre[name] = middle
            parts.append(_cell(name, middle, y, cell, slots))
        x += width + gap
    return _Row(joined(*parts), centre, y)


def _label(x: float, y: float, width: float, label: str) -> Markup:
    size = min(13.0, 1.7 * width / len(label))
    return text(x + width / 2, y, label, size=size) if size >= 5 else Markup()


def _cells(box: _Box) -> list[tuple[int | str, int]]:
    """Contents of a box in order: the embedding, layers by number, the head."""
    names: list[int | str] = [EMBEDDING] if box.has_embedding else []
    names += list(range(box.first, box.stop))
    names += ["head"] if box.has_head else []
    return [(name, position) for position, name in enumerate(names)]


def _cell(name: int | str, middle: float, y: float, cell: float, slots: Sequence[int]) -> Markup:
    """A layer, filled with the colours of the stacks that are added before it."""
    width = cell * 0.84
    own = [stack for stack, slot in enumerate(slots) if slot == name]
    left, top, height = middle - width / 2, y + 6, 50.0
    parts = [rect(left, top, width, height, fill=PAPER, stroke=LINE, rx=min(3.0, width / 4))]
    for index, stack in enumerate(own):
        band = height / len(own)
        parts.append(rect(left, top + index * band, width, band, fill=stack_colour(stack), fill_opacity=0.55))
    if name == EMBEDDING:
        parts.append(rect(left, top, width, height, fill=_GLOBAL, fill_opacity=0.3))
    label = {EMBEDDING: "E", "head": "H"}.get(name, str(name))
    size = min(13.0, width * 0.62)
    if size >= 5:
        parts.append(text(middle, top + height / 2 + size * 0.36, label, size=size, fill=INK))
    return joined(*parts)


def _caption(recipe: Recipe, slots: Sequence[int], height: float) -> Markup:
    """The meaning of the letters."""
    lines = ["E: word embedding, where base tokens take the image's place. H: final norm, output layer, loss."]
    lines.append("A coloured layer has that stack added to its input, at the image's positions.")
    if not slots:
        lines[1] = f"{recipe.model.variant} adds no stacks."
    return joined(
        *(text(_WIDTH / 2, height - 24 + 16 * line, words, size=11, fill=FAINT) for line, words in enumerate(lines))
    )
