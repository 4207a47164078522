"""The parts that all pages share: the document with its style and security policy, sections, tables, and the writing.

Text from data and models is escaped. The page's own policy forbids it to load anything, and to run any script except
the page's own scripts, which are named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_deepstack import __version__
from megatron_deepstack.errors import DataError
from megatron_deepstack.platform.files.write_whole import write_result
from megatron_deepstack.report.drawing.chart import Charts, library_script
from megatron_deepstack.report.drawing.svg import Markup, element, joined


def document(title: str, charts: Charts, *children: str | Markup) -> str:
    """The HTML of a whole page.

    Args:
        title: The page's title.
        charts: The charts whose places are in `children`. If there are none, the page has no script of Bokeh.
        children: What is in the page, in order.

    Returns:
        The HTML.
    """
    folder = files("megatron_deepstack.report")
    style = Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    scripts = [library_script()] if charts.items else []
    scripts.append(folder.joinpath("page.js").read_text(encoding="utf-8"))
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts]
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {' '.join(hashes)}"
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("title", f"{title} - report"),
        element("style", style),
    )
    body = joined(
        element("main", *children, element("footer", _versions())),
        element("script", Markup(_data(charts.items)), type="application/json", id="charts"),
        *(element("script", Markup(script)) for script in scripts),
    )
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en") + "\n"


_BRIEF = 28
"""Cells of at most this many letters are kept on one line."""


def _data(items: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON that cannot end the element that contains it."""
    return json.dumps(items, allow_nan=False).replace("<", "\\u003c")


def section(title: str, *children: str | Markup) -> Markup:
    """A titled box.

    Args:
        title: Text of the heading; it is escaped.
        *children: What stands below it; text is escaped, markup is not.

    Returns:
        An element `section`.
    """
    return element("section", element("h2", title), *children)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Large values with small names below, in a row."""
    return element(
        "div",
        *(element("div", element("b", value), element("span", name), class_="fact") for value, name in pairs),
        class_="facts",
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str | Markup]], *, sortable: bool = False, kinds: Sequence[str] = ()
) -> Markup:
    """A plain table; if it is too wide, it scrolls by itself.

    Args:
        head: Names of the columns.
        rows: Cells of each row.
        sortable: Whether a click on a head sorts by its column.
        kinds: For each row a word by which the section's filter chooses rows; no words if empty.

    Returns:
        The element.
    """
    top = element("tr", *(element("th", name, scope="col") for name in head))
    marks: Sequence[str | None] = kinds or [None] * len(rows)
    lines = [
        element("tr", *(_cell(cell) for cell in row), data_kind=kind) for row, kind in zip(rows, marks, strict=True)
    ]
    style = "plain sortable" if sortable else "plain"
    return element("div", element("table", top, *lines, class_=style), class_="wide")


def _cell(content: str | Markup) -> Markup:
    """A cell. Short contents are never broken into lines, so that a wide table scrolls instead."""
    brief = isinstance(content, Markup) or len(content) <= _BRIEF
    return element("td", content, class_="brief" if brief else None)


def wide_drawing(drawn: Markup) -> Markup:
    """A drawing that keeps a readable size on a narrow screen, where it scrolls sideways."""
    return element("div", drawn, class_="wide drawing", tabindex="0")


def write(file: Path, page: str) -> Path:
    """Write a page.

    Args:
        file: Where to; an existing file is replaced when the new one is complete.
        page: The whole document as text.

    Returns:
        `file`.

    Raises:
        DataError: The file cannot be written.
    """
    try:
        write_result(file, page)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file


def _versions() -> str:
    found = [f"megatron-deepstack {__version__}"]
    for name in ("megatron-core", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
