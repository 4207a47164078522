"""Finding the newest whole checkpoint with all ranks: each reads its share of the files, and all come to one answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_deepstack.checkpoint.folder import (
    Checkpoint,
    manifest_from_json,
    manifest_to_json,
    none_whole,
    open_checkpoint,
    step_folders,
    verify_content,
)
from megatron_deepstack.checkpoint.saving.retention import remove_leftovers
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.parallel.reduce import from_first_rank, of_every_rank


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

    What exists is rank 0's word, so that ranks whose file systems lag do not part ways.
    """
    said = json.loads(from_first_rank(_listed(run_dir) if dist.get_rank() == 0 else ""))
    if said["fault"]:
        raise CheckpointError(said["fault"])
    faults: list[str] = []
    for name in said["names"]:
        try:
            return verify_together(Path(name)), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise none_whole(run_dir, faults)
    return None, []


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
    if said["fault"]:
        raise CheckpointError(said["fault"])
    checkpoint = Checkpoint(path=path, manifest=manifest_from_json(path, said["manifest"]))
    share = shares(checkpoint.manifest.files, dist.get_world_size())[dist.get_rank()]
    faults = [fault for fault in of_every_rank(_fault_in(checkpoint, share)) if fault]
    if faults:
        raise CheckpointError("; ".join(faults))
    return checkpoint


def shares(files: Mapping[str, tuple[int, int]], num_ranks: int) -> list[list[str]]:
    """Names of files for each rank, so that all read about as much: the largest first, each to who has least."""
    loads = [0] * num_ranks
    names: list[list[str]] = [[] for _ in range(num_ranks)]
    for name, (size, _) in sorted(files.items(), key=lambda item: (-item[1][0], item[0])):
        rank = loads.index(min(loads))
        names[rank].append(name)
        loads[rank] += size
    return names


def _opened(path: Path) -> str:
    try:
        manifest, fault = manifest_to_json(open_checkpoint(path).manifest), ""
    except CheckpointError as error:
        manifest, fault = "", str(error)
    return json.dumps({"manifest": manifest, "fault": fault})


def _fault_in(checkpoint: Checkpoint, names: list[str]) -> str:
    """What is wrong with these files; empty if nothing is."""
    for name in names:
        try:
            verify_content(checkpoint, name)
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{checkpoint.path}: {name} cannot be read ({error})"
    return ""
