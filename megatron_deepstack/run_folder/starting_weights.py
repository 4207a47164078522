"""Where each tensor of a run's first step came from: a file of `train.init_from`, or a random draw.

The first rank writes the list into the run folder when a run begins without a checkpoint; the console shows it by part
and folder, and the report by part and file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Final

from megatron_deepstack.config.run_folder import RunFolder
from megatron_deepstack.errors import DataError
from megatron_deepstack.platform.files.write_whole import write_whole
from megatron_deepstack.platform.quantity import number_of

DRAWN: Final = "drawn at random"
_SHOWN: Final = 4
"""Names of tensors that a line lists."""
_MANY: Final = 1_000_000
"""Numbers from which on a table counts in millions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingTensor:
    """One tensor and its origin."""

    name: str
    """Its published name."""
    part: str
    """The part of the model that it belongs to."""
    shape: tuple[int, ...]
    file: str | None
    """The file that it was read from; None if it was drawn at random."""
    name_in_file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Tensors of one part that came from one place."""

    part: str
    place: str
    """A file, a folder, or `DRAWN`."""
    files: int
    """Files of that place."""
    tensors: int
    entries: int
    """Numbers in the tensors."""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Part, tensors, numbers (in millions where there are many), and place, for a table."""
        more = f" ({self.files} files)" if self.files > 1 else ""
        entries = f"{self.entries / 1e6:,.1f} M" if self.entries >= _MANY else f"{self.entries:,}"
        return self.part, f"{self.tensors:,}", entries, f"{self.place}{more}"


HEAD: Final = ("part", "tensors", "numbers", "from")
"""Heads of the columns of `Origin.cells`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingWeights:
    """The origin of every tensor, in the model's order."""

    tensors: tuple[StartingTensor, ...]
    left_over: tuple[str, ...] = ()
    """FILE: NAME of each tensor in the files of `train.init_from` that the model does not use."""

    def origins(self, *, by_file: bool) -> list[Origin]:
        """The tensors in groups of the same part and place.

        Args:
            by_file: Whether a place is a file, or the folder with several files.

        Returns:
            The groups, in the order of their first tensors.
        """
        groups: dict[tuple[str, str], list[StartingTensor]] = {}
        for tensor in self.tensors:
            place = DRAWN if tensor.file is None else tensor.file
            groups.setdefault((tensor.part, place), []).append(tensor)
        if not by_file:
            groups = _by_folder(groups)
        return [
            Origin(
                part=part,
                place=place,
                files=len({tensor.file for tensor in found}),
                tensors=len(found),
                entries=sum(prod(tensor.shape) for tensor in found),
            )
            for (part, place), found in groups.items()
        ]

    def lines(self) -> list[str]:
        """The table for a console, and a line on tensors that are left over."""
        rows = [HEAD, *(origin.cells for origin in self.origins(by_file=False))]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        found = ["starting weights:"]
        for part, tensors, entries, place in rows:
            found.append(f"  {part:<{widths[0]}}  {tensors:>{widths[1]}}  {entries:>{widths[2]}}  {place}")
        if self.left_over:
            shown = ", ".join(self.left_over[:_SHOWN]) + (", ..." if len(self.left_over) > _SHOWN else "")
            found.append(f"  not used by the model: {number_of(len(self.left_over), 'tensor')}: {shown}")
        return found


Group = dict[tuple[str, str], list[StartingTensor]]


def _by_folder(groups: Group) -> Group:
    """The same with the files of a part in one folder together; a single file keeps its name."""
    files: dict[tuple[str, Path], set[str]] = {}
    for part, place in groups:
        if place != DRAWN:
            files.setdefault((part, Path(place).parent), set()).add(place)
    found: Group = {}
    for (part, place), tensors in groups.items():
        several = place != DRAWN and len(files[part, Path(place).parent]) > 1
        found.setdefault((part, str(Path(place).parent) if several else place), []).extend(tensors)
    return found


def write_starting_weights(run: str | Path, weights: StartingWeights) -> None:
    """Write the list into a run folder. One rank calls it.

    Args:
        run: The run folder.
        weights: The list.

    Raises:
        OSError: The disk refuses.
    """
    content = {"tensors": [asdict(tensor) for tensor in weights.tensors], "left_over": weights.left_over}
    write_whole(RunFolder(run).starting_weights, json.dumps(content, indent=1) + "\n")


def read_starting_weights(run: str | Path) -> StartingWeights | None:
    """Read the list of a run folder.

    Args:
        run: The run folder.

    Returns:
        The list; None for a run that has none, such as one of an earlier release.

    Raises:
        DataError: The file is damaged.
    """
    file = RunFolder(run).starting_weights
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tensors = tuple(StartingTensor(**{**one, "shape": tuple(one["shape"])}) for one in content["tensors"])
        return StartingWeights(tensors=tensors, left_over=tuple(content["left_over"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read: {error}; delete it, and the report leaves it out") from error
