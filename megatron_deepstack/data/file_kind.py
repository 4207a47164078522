"""What a file really is, by its first bytes, when its content does not match its name.

Downloads go wrong in a few known ways: the file is a Git LFS pointer, or a login page was saved under the file's name,
or the file is empty. Code that reads a user's file asks here first, so that its error names the real cause and not only
what a parser reports.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Final

START_BYTES: Final = 1024
"""Bytes of a file that are enough to recognise it."""
_LFS: Final = re.compile(rb"version https://git-lfs\.github\.com/spec/")
_LFS_SIZE: Final = re.compile(rb"^size (\d+)", re.MULTILINE)
_ANNEX: Final = re.compile(rb"(\.\./)*(\.git)?/annex/objects/")
_HTML: Final = re.compile(
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL
)
_SVG: Final = re.compile(
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!doctype\s+svg[^>]*>\s*)*<svg\b", re.IGNORECASE | re.DOTALL
)
_XML: Final = re.compile(rb"<(\?xml|error)\b", re.IGNORECASE)
_TIKTOKEN: Final = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)$")
IMAGES: Final = ("a PNG image", "a JPEG image")
"""What `what_file_is` says of images."""
_MAGIC: Final[dict[bytes, str]] = {
    b"\x1f\x8b": "data compressed with gzip: unpack it",
    b"BZh": "data compressed with bzip2: unpack it",
    b"\xfd7zXZ\x00": "data compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "data compressed with zstd: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"PK\x03\x04": "a zip archive (PyTorch's files are such archives too)",
    b"PAR1": "a Parquet file: write its rows as JSON lines",
    b"ARROW1": "an Arrow file: write its rows as JSON lines",
    b"GGUF": "a GGUF file of quantised weights: take the release in safetensors",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x89PNG": IMAGES[0],
    b"\xff\xd8\xff": IMAGES[1],
    b"%PDF-": "a PDF document",
    b"\x00\x05\x16\x07": "a resource fork of macOS (AppleDouble): take the file without `._` before its name",
}


def what_file_is(start: bytes) -> str | None:
    """What content that cannot be used really is, and what to do about it.

    Args:
        start: The file's first bytes, `START_BYTES` of them if it has as many.

    Returns:
        Words that follow "it is", such as "a Git LFS pointer ...: run `git lfs pull` ..."; None if it is not known.
    """
    if not start:
        return "an empty file (0 bytes): fetch or write it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" in start and not text.strip(b"\0"):
        return "a file of zero bytes only, as a broken download or copy leaves it: fetch it again"
    if _LFS.match(text):
        size = _LFS_SIZE.search(text)
        of = f" for a file of {int(size[1])} bytes" if size else ""
        return f"a Git LFS pointer{of}: run `git lfs pull` in the folder it was cloned into"
    if _ANNEX.match(text):
        return "a git-annex pointer: run `git annex get` in the folder it was cloned into"
    if _HTML.match(text):
        return "an HTML page, as a download gives that asks for a login or went wrong: fetch the file itself"
    if _SVG.match(text):
        return "an SVG drawing, which has no pixels: render it to a PNG"
    if _XML.match(text):
        return "an XML document, as an object store answers with when it refuses: fetch the file itself"
    if is_tiktoken(start):
        return "a tiktoken vocabulary (lines of base64 and a number)"
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)


def is_tiktoken(start: bytes) -> bool:
    """Whether the content begins like a tiktoken vocabulary, for example Llama 3's `original/tokenizer.model`."""
    lines = start.splitlines()[:3]
    return bool(lines) and all(_is_rank(line) for line in (lines[:-1] if len(lines) > 1 else lines))


def _is_rank(line: bytes) -> bool:
    found = _TIKTOKEN.match(line)
    if found is None:
        return False
    try:
        return bool(base64.b64decode(found[1], validate=True))
    except binascii.Error:
        return False


def what_is_at(path: Path) -> str | None:
    """What the file at a path really is, in the words of `what_file_is`; None if not known, or not readable."""
    try:
        with path.open("rb") as file:
            return what_file_is(file.read(START_BYTES))
    except OSError:
        return None
