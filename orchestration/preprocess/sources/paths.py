"""Paths of a recipe that are not there: all named at once, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.errors import DataError
from orchestration.preprocess.sources.inputs import find_files

_SHOWN: Final = 10


def check_paths(records: Sequence[str], images: str | None, tokenizer: str) -> None:
    """Raise DataError if several of a job's paths are missing; a single one is named where it is opened.

    Args:
        records: Paths, patterns and URLs of record files.
        images: Folder or URL of images. It may be missing as long as all images lie in tar shards.
        tokenizer: File or folder of the tokenizer.

    Raises:
        DataError: Two or more are missing; each is named with its field, and with the folder it was looked for in.
    """
    missing = list(_missing_records(records))
    if not Path(tokenizer).exists():
        missing.append(_line("tokenizer", tokenizer, "no such file or folder"))
    folder = None if images is None else Location.parse(images)
    if missing and folder is not None and folder.is_local and not folder.is_folder():
        missing.append(_line("images", str(images), "no such folder"))
    if len(missing) > 1:
        more = [f"... and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        head = f"{len(missing)} paths of the recipe are not there:"
        raise DataError(
            "\n  ".join([head, *missing[:_SHOWN], *more]) + "\nCorrect them in the recipe, or set them behind it."
        )


def _missing_records(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            files = list(find_files([pattern]))
        except DataError:  # a pattern that matches nothing, or is none
            yield _line("records", pattern, "no file matches")
            continue
        for file in files:
            if file.is_local and not file.exists():
                yield _line("records", str(file), "no such file")


def _line(field: str, path: str, what: str) -> str:
    return f"data.{field}={path}: {what}{Location.parse(path).looked_in}"
