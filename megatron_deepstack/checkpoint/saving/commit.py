"""The end of a save, on rank 0 and beside training: index, recipe and manifest, then the folder's name.

What each rank wrote is read from the notes that the ranks' writers left, with the checksums they took while writing;
no data file is read again.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_deepstack import __version__
from megatron_deepstack.checkpoint.folder import Manifest, fingerprint, partial_path, publish, write_manifest
from megatron_deepstack.checkpoint.saving.retention import LOCK, prune
from megatron_deepstack.checkpoint.saving.writer import NOTE
from megatron_deepstack.config.run_folder import RECIPE_FILE
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.parallel.groups import Axes
from megatron_deepstack.platform.files.write_whole import write_through

INDEX = ".metadata"


@dataclass(frozen=True, slots=True)
class Commit:
    """What is recorded of a run with each checkpoint."""

    facts: Mapping[str, Any]
    """Identity of the run."""
    samples: Mapping[str, Any]
    """What the run reads, for people."""
    layout: Mapping[str, int]
    num_ranks: int
    recipe_text: str
    keep: int
    keep_every: int
    weights_alone: bool = False
    """There are no states of an optimizer."""
    faults: list[str] = field(default_factory=list)
    """Lines for the user on older checkpoints that could not be deleted. The caller that shows them removes them."""

    def run(self, final: Path, step: int, metadata: Metadata) -> int:
        """Complete the partial folder of `final`, give it its name, and delete checkpoints that are no longer needed.

        One rank calls it, when the writers of all ranks are done.

        Args:
            final: Folder of the checkpoint.
            step: Steps done.
            metadata: Megatron's index of the tensors.

        Returns:
            Size of the checkpoint in bytes.

        Raises:
            OSError: The disk refuses.
        """
        partial = partial_path(final)
        files = self._finish(partial, metadata)
        write_manifest(
            partial,
            Manifest(
                step=step,
                facts=dict(self.facts),
                files=files,
                layout=dict(self.layout),
                made_with=made_with(),
                samples=dict(self.samples),
                weights_alone=self.weights_alone,
            ),
        )
        (partial / LOCK).unlink(missing_ok=True)
        publish(partial, final)
        self.faults.extend(prune(final.parent.parent, step, keep=self.keep, keep_every=self.keep_every))
        return sum(size for size, _ in files.values())

    def _finish(self, partial: Path, metadata: Metadata) -> dict[str, tuple[int, int]]:
        """Write index and recipe, remove the notes; size and crc32c of every file."""
        files, results = _take_notes(partial, self.num_ranks)
        FileSystemWriter(partial).finish(_without_plans(metadata), [results])
        write_through(partial / RECIPE_FILE, self.recipe_text)
        return {**files, **{name: fingerprint(partial / name) for name in (INDEX, RECIPE_FILE)}}


def layout_facts(axes: Axes, parallel: ParallelConfig) -> dict[str, int]:
    """The layout as a manifest records it.

    Args:
        axes: Ranks on each axis.
        parallel: The recipe's section on parallelism.

    Returns:
        Ranks by name of the axis, and `vpp`: chunks of a pipeline stage; `ep` where ranks share experts.
    """
    experts = {"ep": parallel.expert} if parallel.expert > 1 else {}
    return {**asdict(axes), "vpp": parallel.virtual_pipeline, **experts}


def made_with() -> dict[str, str]:
    """Versions of what writes a checkpoint."""
    return {
        "megatron-deepstack": __version__,
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _without_plans(metadata: Metadata) -> Metadata:
    """A copy without the ranks' plans, which Megatron adds and no reader needs: most of the index."""
    copied = copy.copy(metadata)
    vars(copied).pop("all_local_plans", None)
    return copied


def _take_notes(partial: Path, num_ranks: int) -> tuple[dict[str, tuple[int, int]], list[WriteResult]]:
    files: dict[str, tuple[int, int]] = {}
    results = []
    for rank in range(num_ranks):
        note = partial / NOTE.format(rank=rank)
        if not note.exists():
            raise OSError(f"rank {rank} wrote elsewhere: {note} is not there; run_dir must be one folder for all nodes")
        content = json.loads(note.read_text(encoding="utf-8"))
        files.update({name: (size, crc) for name, (size, crc) in content["files"].items()})
        for key, offset, number, file, begin, length in content["items"]:
            index = MetadataIndex(key, None if offset is None else torch.Size(offset), number)
            results.append(
                WriteResult(index=index, size_in_bytes=length, storage_data=_StorageInfo(file, begin, length))
            )
        note.unlink()
    return files, results
