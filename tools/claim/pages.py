"""The documents of the claim: pages of four kinds, and a question about each.

Three kinds can only be read in the crops: a number in the cells of a table, a word in the fields of a form, and the
labels of a chart's legend. Their print is 4 x 5 pixels a character in the crops, and half of that in the global view,
where the smallest legible fonts need 3 x 5. The fourth kind is the control: the colour of a large shape, which the
global view shows as well as the crops do.

Every page is square, so that all arms of the claim see the same two by two crops. It is laid out on the patches of its
high-res view and painted larger. What is to be read stands in several places, so that a small model finds it within
minutes of training from scratch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELLS = 8
"""Cells along a side of a page: two views of four patches."""
CELL_PIXELS = 14
"""Side of a cell in the high-res view."""
FONT_PIXELS = 6.5
"""Font size in pixels of the high-res view."""
WORDS = (
    "ASH",
    "BAY",
    "CUP",
    "DEW",
    "EEL",
    "FIG",
    "GUM",
    "HAT",
    "INK",
    "JAR",
    "KEY",
    "LOG",
    "MAP",
    "NUT",
    "OAK",
    "PEN",
    "POD",
    "RUG",
    "SKY",
    "TEA",
    "URN",
    "VAN",
    "WAX",
    "YAK",
    "ZOO",
    "ARC",
    "BOX",
    "COG",
)
"""Words that a form may show."""
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 200),
    "orange": (235, 140, 30),
    "purple": (140, 60, 170),
    "brown": (120, 80, 50),
}
"""Colours of the control's shape."""
LETTERS = "ABCDEFGHJK"
"""Letters of a legend's labels; a digit follows."""
_PRINTED_SHARE = 0.3
_JITTER_PIXELS = 0.6

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Document:
    """A painted page with its question and answer."""

    kind: str
    picture: Image.Image
    question: str
    answer: str


class _Pen:
    """Draws on a page in cells, x to the right and y down."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.side = round(CELLS * CELL_PIXELS * rng.uniform(1.3, 2.0))
        self.cell = self.side / CELLS
        self.picture = Image.new("RGB", (self.side, self.side), self._colour(225, 255))
        self.ink = self._colour(0, 60)
        self._draw = ImageDraw.Draw(self.picture)
        self._font = ImageFont.load_default(FONT_PIXELS * self.cell / CELL_PIXELS)

    def _colour(self, low: int, high: int) -> Colour:
        return (self.rng.randint(low, high), self.rng.randint(low, high), self.rng.randint(low, high))

    def grey(self) -> Colour:
        level = self.rng.randint(120, 200)
        return (level, level, level)

    def bright(self) -> Colour:
        return self._colour(30, 200)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        cell = self.cell
        self._draw.rectangle((left * cell, top * cell, right * cell, bottom * cell), fill=colour)

    def disc(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        cell = self.cell
        self._draw.ellipse((left * cell, top * cell, right * cell, bottom * cell), fill=colour)

    def frame(self, left: float, top: float, right: float, bottom: float) -> None:
        cell = self.cell
        self._draw.rectangle((left * cell, top * cell, right * cell, bottom * cell), outline=self.grey())

    def text(self, column: int, row: int, text: str) -> None:
        """Print `text` in the middle of a cell, a little off."""
        jitter = _JITTER_PIXELS / CELL_PIXELS
        x, y = (place + 0.5 + self.rng.uniform(-jitter, jitter) for place in (column, row))
        self._draw.text((x * self.cell, y * self.cell), text, font=self._font, fill=self.ink, anchor="mm")

    def word(self, column: int, row: int) -> None:
        """Two grey lines that stand for a word that nobody has to read."""
        for top in (0.2, 0.55):
            self.box(column + 0.05, row + top, column + self.rng.uniform(0.6, 0.95), row + top + 0.2, self.grey())


def _table(pen: _Pen) -> tuple[str, str]:
    """A ruled table: the number stands in some of its cells, and a coloured head above each column."""
    rng, number, head = pen.rng, f"{pen.rng.randrange(100):02d}", pen.bright()
    for column in range(CELLS):
        pen.box(column + 0.05, 0.1, column + 0.95, 0.8, head)
        for row in range(1, CELLS):
            pen.frame(column, row, column + 1, row + 1)
    for column, row in _chosen(rng, 1):
        pen.text(column, row, number)
    return rng.choice(("What number stands in the table?", "Read the cells of the table.")), number


def _form(pen: _Pen) -> tuple[str, str]:
    """A form: labels on the left of each half, fields on the right, and the word in some of the fields."""
    rng, word = pen.rng, pen.rng.choice(WORDS)
    fields = [(column, row) for row in range(CELLS) for column in (1, 2, 5, 6)]
    filled = {rng.choice(fields)} | {field for field in fields if rng.random() < 2 * _PRINTED_SHARE}
    for row in range(CELLS):
        for column in (0, 4):
            pen.word(column, row)
        for column in (1, 5):
            pen.box(column, row + 0.92, column + 2, row + 0.98, pen.grey())
    for column, row in sorted(filled):
        pen.text(column, row, word)
    return rng.choice(("Which word fills the form?", "What is written in the form?")), word


def _chart(pen: _Pen) -> tuple[str, str]:
    """Bars of a chart in the lower half, and a legend in the upper half whose entries carry the label."""
    rng, label = pen.rng, f"{pen.rng.choice(LETTERS)}{pen.rng.randrange(10)}"
    for column in range(CELLS):
        pen.box(column + 0.15, CELLS - rng.uniform(0.5, 3.8), column + 0.85, CELLS, pen.bright())
    places = [(column, row) for row in range(4) for column in (1, 3, 5, 7)]
    entries = {rng.choice(places)} | {place for place in places if rng.random() < 3 * _PRINTED_SHARE}
    for column, row in sorted(entries):
        pen.box(column - 0.6, row + 0.25, column - 0.1, row + 0.75, pen.bright())
        pen.text(column, row, label)
    return rng.choice(("Which label has the legend?", "Read the legend of the chart.")), label


def _shape(pen: _Pen) -> tuple[str, str]:
    """A large shape among grey words."""
    rng, name = pen.rng, pen.rng.choice(sorted(COLOURS))
    for column in range(CELLS):
        for row in range(CELLS):
            if rng.random() < _PRINTED_SHARE:
                pen.word(column, row)
    width, height = rng.uniform(3, 6), rng.uniform(3, 6)
    left, top = rng.uniform(0, CELLS - width), rng.uniform(0, CELLS - height)
    draw = rng.choice((pen.box, pen.disc))
    draw(left, top, left + width, top + height, COLOURS[name])
    return rng.choice(("What colour is the large shape?", "Name the colour of the shape.")), name


def _chosen(rng: random.Random, first_row: int) -> list[tuple[int, int]]:
    cells = [(column, row) for row in range(first_row, CELLS) for column in range(CELLS)]
    return sorted({rng.choice(cells)} | {cell for cell in cells if rng.random() < _PRINTED_SHARE})


KINDS: Mapping[str, Callable[[_Pen], tuple[str, str]]] = {
    "table": _table,
    "form": _form,
    "chart": _chart,
    "control": _shape,
}
"""Kinds of document, in the order of the result's columns."""
FINE_KINDS = ("table", "form", "chart")
"""Those that only the crops show."""
QUESTIONS = (
    "What number stands in the table?",
    "Read the cells of the table.",
    "Which word fills the form?",
    "What is written in the form?",
    "Which label has the legend?",
    "Read the legend of the chart.",
    "What colour is the large shape?",
    "Name the colour of the shape.",
)
"""All questions, for the tokenizer."""
ANSWERS = (
    *(f"{number:02d}" for number in range(100)),
    *WORDS,
    *(f"{letter}{digit}" for letter in LETTERS for digit in range(10)),
    *COLOURS,
)
"""All answers, for the tokenizer."""


def compose(kind: str, seed: str) -> Document:
    """Paint a page of a kind; the same seed gives the same page.

    Args:
        kind: One of `KINDS`.
        seed: What everything random on the page is drawn from.

    Returns:
        The page, with a question and the answer.
    """
    pen = _Pen(random.Random(f"{kind}/{seed}"))
    question, answer = KINDS[kind](pen)
    return Document(kind, pen.picture, question, answer)
