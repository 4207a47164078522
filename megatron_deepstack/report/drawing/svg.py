"""Markup from Python values: elements whose text and attributes are always escaped."""

from __future__ import annotations

import math
from html import escape


class Markup(str):
    """Text that is markup already, made by `element` from escaped parts."""

    __slots__ = ()


def element(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """Make `<name attribute="...">children</name>`.

    Args:
        name: The element's name.
        children: Its content. Plain strings are escaped, Markup is not.
        attributes: In names, `_` means `-`, and a trailing `_` avoids Python's keywords. A number is written with at
            most two decimals; an attribute that is None is left out.

    Returns:
        The element.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{joined(*children)}</{name}>")


def joined(*children: str | Markup) -> Markup:
    """Children one after the other; plain strings are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def drawing(width: float, height: float, title: str, *children: Markup) -> Markup:
    """An `<svg>` that scales to its container.

    Args:
        width: Width of its coordinate system.
        height: Height of its coordinate system.
        title: Describes it to those who cannot see it.
        children: What is drawn, in order.

    Returns:
        The element.
    """
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        role="img",
        xmlns="http://www.w3.org/2000/svg",
        font_family="system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    )


def text(x: float, y: float, content: str, *, size: float = 12, **attributes: str | float | None) -> Markup:
    """One line of text.

    Args:
        x: Middle of the text, or what the attribute `text_anchor` says, in the units of the drawing.
        y: Its base line.
        content: The text; it is escaped.
        size: Height of the letters, in the units of the drawing.
        **attributes: Further attributes, with `_` where SVG has `-`.

    Returns:
        An element `text`.
    """
    return element("text", content, x=x, y=y, font_size=size, **{"text_anchor": "middle", "fill": INK} | attributes)


def rect(x: float, y: float, width: float, height: float, **attributes: str | float | None) -> Markup:
    """A rectangle.

    Args:
        x: Left edge, in the units of the drawing.
        y: Upper edge.
        width: Width in the same units.
        height: Height in the same units.
        **attributes: Further attributes, with `_` where SVG has `-`.

    Returns:
        An element `rect`.
    """
    return element("rect", x=x, y=y, width=width, height=height, **attributes)


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


INK = "#1f2933"
"""Colour of text and lines."""
FAINT = "#7b8794"
"""Colour of secondary text."""
LINE = "#cbd2d9"
"""Colour of rules and borders."""
PAPER = "#ffffff"
"""Background."""
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#7a5c3e")
"""Colours of the stacks, which colour-blind readers can distinguish (after Okabe and Ito)."""


def stack_colour(stack: int) -> str:
    """The colour of a stack; after the last colour of the palette it begins again."""
    return PALETTE[stack % len(PALETTE)]


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers for an axis.

    Args:
        low: Smallest value.
        high: Largest value.
        count: About how many numbers are wanted.

    Returns:
        Multiples of 1, 2 or 5 times a power of ten, the first at most `low`, the last at least `high`.
    """
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    unit = 10 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= count)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [index * step for index in range(first, last + 1)]
