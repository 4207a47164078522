"""What all pages share: the document with its style and security policy, sections, tables, and writing it to a file.

Text from data and models is escaped, and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_deepstack import __version__
from megatron_deepstack.errors import DataError
from megatron_deepstack.report.svg import Markup, element, joined

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, *children: str | Markup) -> str:
    """A whole page's HTML."""
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{title} - report"),
        element("style", style),
    )
    body = element("main", *children, element("footer", _versions()))
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en") + "\n"


def section(title: str, *children: str | Markup) -> Markup:
    """A titled box."""
    return element("section", element("h2", title), *children)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Large values with small names, side by side."""
    return element(
        "div",
        *(element("div", element("b", value), element("span", name), class_="fact") for value, name in pairs),
        class_="facts",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str | Markup]]) -> Markup:
    """A plain table that scrolls by itself where it is wide."""
    top = element("tr", *(element("th", name) for name in head))
    lines = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    return element("div", element("table", top, *lines, class_="plain"), class_="wide")


def duration(seconds: float) -> str:
    """As people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def write(file: Path, page: str) -> Path:
    """Write a page and return its file. Raises DataError if it cannot be written."""
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error}") from error
    return file


def _versions() -> str:
    found = [f"megatron-deepstack {__version__}"]
    for name in ("megatron-core", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
