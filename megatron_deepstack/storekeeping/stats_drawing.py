"""The histograms of `store stats` as one SVG file: axes with counts, a number on each bar, a light and a dark theme."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megatron_deepstack.report.drawing.svg import Markup, drawing, element, rect, round_ticks, text
from megatron_deepstack.storekeeping.stats import Histogram, Statistics

_PANEL: Final = (560, 370)
"""Width and height. A phone shows a drawing of this width at 0.7 of its size, so no text is smaller than 13."""
_HEAD: Final = 52
_PLOT: Final = (92, 66, 452, 196)
"""Left, top, width and height of the bars in a panel."""
_LETTER: Final = 7.8
"""Width of a letter of the labels."""
_WIDEST: Final = 64
_STYLE: Final = (
    "svg { background: #fff } .ink { fill: #1f2933 } .faint { fill: #616e7c } .bar { fill: #0072b2 } "
    ".rule { stroke: #cbd2d9 } .axis { stroke: #7b8794 } "
    "@media (prefers-color-scheme: dark) { svg { background: #12161c } .ink { fill: #e6ebf1 } "
    ".faint { fill: #9aa7b4 } .bar { fill: #56b4e9 } .rule { stroke: #2d3742 } .axis { stroke: #616e7c } }"
)


def drawn(stats: Statistics, title: str) -> Markup:
    """The histograms one below the other under a title. The pointer over a bar shows its label and count.

    Args:
        stats: The counts of a store.
        title: Text above the histograms; it is escaped.

    Returns:
        An element `svg` with its own style for light and dark themes.
    """
    width, height = _PANEL
    panels = [
        element("g", *_panel(one), transform=f"translate(0,{_HEAD + k * height})")
        for k, one in enumerate(stats.histograms)
    ]
    size = min(20.0, (width - 32) / (0.6 * len(title)))  # a letter is at most 0.6 of the size wide
    head = _words(16, 34, title, "ink", size=size, text_anchor="start", font_weight="600")
    style = element("style", Markup(_STYLE))
    return drawing(width, _HEAD + height * len(panels), title, style, head, *panels)


def _panel(one: Histogram) -> Iterator[Markup]:
    left, top, width, height = _PLOT
    yield _words(16, 26, one.title, "ink", size=17, text_anchor="start", font_weight="600")
    if not one.bins:
        yield _words(16, 52, f"no {one.of}", "faint", size=14, text_anchor="start")
        return
    most = max(count for _, count in one.bins)
    ticks = [tick for tick in round_ticks(0, most, count=4) if tick == int(tick)]
    scale = height / max(ticks[-1], 1)
    for tick in ticks:
        y = top + height - tick * scale
        yield element("line", x1=left, x2=left + width, y1=y, y2=y, class_="rule" if tick else "axis")
        yield _words(left - 8, y + 4, f"{int(tick):,}", "faint", size=13, text_anchor="end")
    yield _words(left, top - 16, one.of, "faint", size=13, text_anchor="end")
    step = min(width / len(one.bins), _WIDEST)
    slanted = any(len(label) * _LETTER > step - 4 for label, _ in one.bins)
    for k, (label, count) in enumerate(one.bins):
        middle, tall = left + (k + 0.5) * step, count * scale
        bar = rect(middle - step * 0.4, top + height - tall, step * 0.8, tall, class_="bar")
        yield element("g", element("title", f"{label}: {count:,} {one.of}"), bar)
        if len(f"{count:,}") * _LETTER <= step:
            yield _words(middle, top + height - tall - 5, f"{count:,}", "ink", size=13)
        yield _label(middle, top + height + 17, label, slanted=slanted)


def _label(x: float, y: float, label: str, *, slanted: bool) -> Markup:
    """The whole label of a bin; labels are slanted if they would touch each other."""
    if not slanted:
        return _words(x, y, label, "faint", size=13)
    return _words(x + 4, y, label, "faint", size=13, text_anchor="end", transform=f"rotate(-40 {x + 4:.1f} {y:.1f})")


def _words(x: float, y: float, content: str, kind: str, **attributes: str | float | None) -> Markup:
    """Text in the colour that the style sheet gives to its `kind`."""
    size = attributes.pop("size", 12)
    return text(x, y, content, size=float(size or 12), fill=None, class_=kind, **attributes)
