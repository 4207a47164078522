"""The documents of the repository, their links, code blocks and commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
)
"""Every Markdown page that a reader is sent to."""


def name_of(page: Path) -> str:
    """A page's path below the repository, as a test id."""
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """A page's prose, in which brackets are links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def links(page: Path) -> list[str]:
    """Targets of a page's links within the repository, pictures included."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page)))
    return [target for target in targets if not re.match(r"[a-z]+://", target)]


def anchors(page: Path) -> set[str]:
    """Names under which a page's headings can be linked to."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(language: str, text: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program: str, text: str) -> list[list[str]]:
    """Words of the commands of a program in a text's shell blocks, without the program's name."""
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [words[1:] for words in map(shlex.split, lines) if words and words[0] == program]


def section(title: str, text: str) -> str:
    """One section of a page, up to the next of its level."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]
