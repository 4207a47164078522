"""Finding the newest whole checkpoint with all ranks: each reads its share of the files, and all get one answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import torch.distributed as dist

from megatron_deepstack.checkpoint.folder import (
    Checkpoint,
    OutOfReach,
    first_whole,
    manifest_from_json,
    manifest_to_json,
    open_checkpoint,
    step_folders,
    verify_content,
)
from megatron_deepstack.checkpoint.saving.retention import remove_leftovers
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.parallel.reduce import from_first_rank, of_every_rank

_LOOKS: Final = 5
"""How often checkpoints are listed, if they disappear while they are read."""


def remove_leftovers_together(run_dir: str | Path) -> None:
    """`retention.remove_leftovers`, done by rank 0. Collective over all ranks; raises as it does, on every rank."""
    fault = ""
    if dist.get_rank() == 0:
        try:
            remove_leftovers(run_dir)
        except (CheckpointError, OSError) as error:
            fault = str(error)
    if fault := from_first_rank(fault):
        raise CheckpointError(fault)


def newest_whole_together(run_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """`folder.newest_whole`, its reading spread over the ranks. Collective over all ranks; raises as it does.

    Rank 0 says which checkpoints exist, so that ranks whose file systems show changes late do not differ. A run that
    trains meanwhile deletes checkpoints: if one disappears while it is read, there are newer ones, and rank 0 looks
    again.
    """
    for _ in range(_LOOKS):
        said = json.loads(from_first_rank(_listed(run_dir) if dist.get_rank() == 0 else ""))
        if said["fault"]:
            raise CheckpointError(said["fault"])
        with suppress(_DeletedError):
            return first_whole(run_dir, [Path(name) for name in said["names"]], _verify_if_there)
    raise CheckpointError(
        f"{run_dir}: its checkpoints were deleted while they were read, {_LOOKS} times: a run that trains there keeps "
        "the newest `checkpoint.keep` alone. Run the same command again, later or when that run has ended"
    )


class _DeletedError(Exception):
    """A checkpoint was deleted while it was read."""


def _verify_if_there(path: Path) -> Checkpoint:
    """`verify_together`; raises _DeletedError, on every rank, if the folder is gone by now, as rank 0 sees it."""
    try:
        return verify_together(path)
    except OutOfReach:
        raise
    except CheckpointError:
        if from_first_rank("" if path.is_dir() else "gone"):
            raise _DeletedError from None
        raise


def _listed(run_dir: str | Path) -> str:
    try:
        names, fault = [str(path) for _, path in reversed(step_folders(run_dir))], ""
    except OSError as error:
        names, fault = [], f"{run_dir}: its checkpoints cannot be listed ({error}); look whether the folder is well"
    return json.dumps({"names": names, "fault": fault})


def verify_together(path: Path) -> Checkpoint:
    """`folder.verify`, its reading spread over the ranks. Collective over all ranks.

    Raises CheckpointError with the same words on every rank.
    """
    said = json.loads(from_first_rank(_opened(path) if dist.get_rank() == 0 else ""))
    _raise_for([said])
    checkpoint = Checkpoint(path=path, manifest=manifest_from_json(path, said["manifest"]))
    share = shares(checkpoint.manifest.files, dist.get_world_size())[dist.get_rank()]
    _raise_for([json.loads(one) for one in of_every_rank(_fault_in(checkpoint, share))])
    return checkpoint


def _raise_for(said: Sequence[Mapping[str, str]]) -> None:
    """Raise what ranks have found; that one cannot read a file weighs more than that another file is damaged."""
    away = [one["away"] for one in said if one["away"]]
    if away:
        raise OutOfReach("; ".join(away))
    faults = [one["fault"] for one in said if one["fault"]]
    if faults:
        raise CheckpointError("; ".join(faults))


def shares(files: Mapping[str, tuple[int, int]], num_ranks: int) -> list[list[str]]:
    """Divide files among ranks so that all read about the same number of bytes.

    The largest files are given first, each to the rank that has the fewest bytes so far.

    Args:
        files: Size in bytes and crc32c by name.
        num_ranks: Number of ranks.

    Returns:
        Names of files, one list for each rank.
    """
    loads = [0] * num_ranks
    names: list[list[str]] = [[] for _ in range(num_ranks)]
    for name, (size, _) in sorted(files.items(), key=lambda item: (-item[1][0], item[0])):
        rank = loads.index(min(loads))
        names[rank].append(name)
        loads[rank] += size
    return names


def _opened(path: Path) -> str:
    manifest, found = "", _Found()
    with found:
        manifest = manifest_to_json(open_checkpoint(path).manifest)
    return json.dumps({"manifest": manifest, **found.words})


def _fault_in(checkpoint: Checkpoint, names: list[str]) -> str:
    """What is wrong with these files, as JSON."""
    found = _Found()
    with found:
        for name in names:
            verify_content(checkpoint, name)
    return json.dumps(found.words)


class _Found:
    """A context manager that keeps what is wrong with a checkpoint, in words that travel between ranks."""

    def __init__(self) -> None:
        self.words = {"fault": "", "away": ""}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, CheckpointError):
            self.words["away" if isinstance(error, OutOfReach) else "fault"] = str(error)
            return True
        return False
