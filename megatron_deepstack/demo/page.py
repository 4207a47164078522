"""One page of the demo: grey words, coloured rules, and the same tiny number in about a quarter of the word places.

A page is laid out on the patches of its high-res view, one word or number per patch, and painted larger, at a size and
aspect ratio of its own; preprocessing scales it back to those patches. A digit is then about 4 x 5 pixels in the crops,
which can just be read. The global view has half of that resolution or less in at least one direction: there a digit is
less than 2 pixels wide or less than 2.5 high, and the smallest digit fonts need 3 x 5. So the global view shows where
text is printed, but not what it says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

VIEW_PIXELS = 56
"""Side of the views that pages are drawn for."""
CELL_PIXELS = 14
"""Side of a lattice cell in the high-res view; the demo's patch."""
FONT_PIXELS = 6.5
"""Font size in pixels of the high-res view."""

Grid = tuple[int, int]
Cell = tuple[int, int]
Colour = tuple[int, int, int]

GRID_SHARES: dict[Grid, float] = {
    (2, 2): 0.58,
    (1, 2): 0.07,
    (2, 1): 0.07,
    (1, 3): 0.07,
    (3, 1): 0.07,
    (1, 4): 0.07,
    (4, 1): 0.07,
}
"""Share of pages whose shape makes preprocessing (best fit, at most 4 crops) pick this grid."""

_NUMBER_SHARE = 0.25
_RULE_ROW_SHARE, _BLANK_ROW_SHARE = 0.15, 0.25
_WORD_SHARE = 0.56
_WORD_LINES = (0.15, 0.5)
_WORD_HEIGHT = 0.2
_JITTER_PIXELS = 0.6


@dataclass(frozen=True, slots=True)
class Mark:
    """A filled rectangle: its corners in cells (x to the right, y down) from the page's top left, and its colour."""

    box: tuple[float, float, float, float]
    colour: Colour


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that is on a page."""

    grid: Grid
    """Columns and rows of crops that its shape asks for."""
    size: tuple[int, int]
    """Width and height of the picture in pixels."""
    number: str
    """Two digits, the same everywhere on the page."""
    places: tuple[tuple[float, float], ...]
    """Centre of each print of the number, in cells."""
    paper: Colour
    ink: Colour
    marks: tuple[Mark, ...]
    """Words and rules."""

    @property
    def cell_size(self) -> tuple[float, float]:
        """Width and height of a cell in pixels of the picture."""
        columns, rows = lattice(self.grid)
        return self.size[0] / columns, self.size[1] / rows

    @property
    def font_size(self) -> float:
        """Font size in pixels of the picture."""
        return FONT_PIXELS * min(self.cell_size) / CELL_PIXELS


def lattice(grid: Grid) -> tuple[int, int]:
    """Columns and rows of cells on a page."""
    per_view = VIEW_PIXELS // CELL_PIXELS
    return grid[0] * per_view, grid[1] * per_view


def compose_page(rng: random.Random) -> Page:
    """A random page, which depends only on the state of `rng`."""
    (grid,) = rng.choices(list(GRID_SHARES), list(GRID_SHARES.values()))
    columns, rows = lattice(grid)
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    printed = {rng.choice(cells)} | {cell for cell in cells if rng.random() < _NUMBER_SHARE}
    return Page(
        grid=grid,
        size=_size(rng, grid),
        number=f"{rng.randrange(100):02d}",
        places=tuple(_place(rng, cell) for cell in cells if cell in printed),
        paper=(rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255)),
        ink=(rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60)),
        marks=_marks(rng, [cell for cell in cells if cell not in printed], rows),
    )


def paint_page(page: Page) -> Image.Image:
    """The page as an RGB picture."""
    picture = Image.new("RGB", page.size, page.paper)
    pen = ImageDraw.Draw(picture)
    width, height = page.cell_size
    for mark in page.marks:
        left, top, right, bottom = mark.box
        pen.rectangle((left * width, top * height, right * width, bottom * height), fill=mark.colour)
    font = ImageFont.load_default(page.font_size)
    for x, y in page.places:
        pen.text((x * width, y * height), page.number, font=font, fill=page.ink, anchor="mm")
    return picture


def _size(rng: random.Random, grid: Grid) -> tuple[int, int]:
    """A size for which `grid` is the best fit; 1:2 must be exact, since any other grid keeps more of 1:1.99."""
    short = round(VIEW_PIXELS * rng.uniform(2.5, 4.0))
    if grid == (2, 2):
        return 2 * short, round(2 * short * rng.uniform(0.93, 1.07))
    num_crops = max(grid)
    long = round(num_crops * short * (1.0 if num_crops == 2 else rng.uniform(0.93, 1.0)))
    return (long, short) if grid[0] > 1 else (short, long)


def _place(rng: random.Random, cell: Cell) -> tuple[float, float]:
    jitter = _JITTER_PIXELS / CELL_PIXELS
    return cell[0] + 0.5 + rng.uniform(-jitter, jitter), cell[1] + 0.5 + rng.uniform(-jitter, jitter)


def _marks(rng: random.Random, free: list[Cell], num_rows: int) -> tuple[Mark, ...]:
    """Each row of cells is blank, a coloured rule, or words of two short lines; `free` are cells without a number."""
    rule_colour = (rng.randint(30, 200), rng.randint(30, 200), rng.randint(30, 200))
    kinds = [rng.random() for _ in range(num_rows)]
    marks = []
    for column, row in free:
        if kinds[row] < _RULE_ROW_SHARE:
            marks.append(Mark((column, row + 0.1, column + 1, row + 0.9), rule_colour))
        elif kinds[row] < 1 - _BLANK_ROW_SHARE and rng.random() < _WORD_SHARE:
            marks += _word(rng, column, row)
    return tuple(marks)


def _word(rng: random.Random, column: int, row: int) -> list[Mark]:
    grey = rng.randint(120, 200)
    return [
        Mark((column, row + top, column + rng.uniform(0.6, 1.0), row + top + _WORD_HEIGHT), (grey, grey, grey))
        for top in _WORD_LINES
    ]
