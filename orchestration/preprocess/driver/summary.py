"""What a job did, as a value and as `report.json` in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.quarantine import flagged_by_reason
from megatron_deepstack.data.store.schema import METADATA_FILE
from megatron_deepstack.data.store.writer import write_json
from orchestration.preprocess.driver.progress import JobProgress

REPORT_FILE: Final = "report.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did; also `report.json` in the store."""

    store: str
    images: int
    flagged: int
    quarantined: int
    flagged_by_reason: dict[str, int]
    """Images that are flagged, by the kind of the reason, the commonest first."""
    views: int
    samples: int
    dropped: int
    tokens: int
    target_tokens: int
    parts: int
    images_done_before: int
    """Images that an earlier, interrupted job had finished."""
    parts_done_before: int
    parts_done_again: int
    """Times a part was done again after its worker or node had died."""
    workers: int
    """Worker processes; 0 if the job's own process did the work."""
    nodes: dict[str, int]
    """Parts done now, by the host name or address of the node that did them."""
    seconds: float
    images_per_second: float
    """Of the images done now."""
    written_bytes: int


def write_report(root: Location, counts: Mapping[str, int], progress: JobProgress) -> Summary:
    """Write the report of the job that has just ended.

    Args:
        root: The store.
        counts: The counts of the finished store.
        progress: What this job has done.

    Returns:
        The same report as a value.
    """
    summary = _summary(root, counts, progress)
    write_json(root.child(REPORT_FILE), asdict(summary))
    return summary


def _summary(root: Location, counts: Mapping[str, int], progress: JobProgress) -> Summary:
    seconds = progress.seconds
    return Summary(
        store=str(root),
        **counts,
        flagged_by_reason=flagged_by_reason(root),
        parts=progress.parts,
        images_done_before=progress.images - progress.images_now,
        parts_done_before=progress.parts - progress.nodes.total(),
        parts_done_again=progress.parts_done_again,
        workers=progress.workers,
        nodes=dict(sorted(progress.nodes.items())),
        seconds=round(seconds, 2),
        images_per_second=round(progress.images_now / max(seconds, 1e-9), 2),
        written_bytes=progress.bytes_now,
    )


def is_complete(root: Location) -> bool:
    """The store in `root` is finished."""
    try:
        return bool(_attributes(root)["complete"])
    except (FileNotFoundError, ValueError, KeyError):
        return False


def nothing_done(root: Location, num_parts: int) -> Summary:
    """What a job on a finished store did: its counts, and no work.

    The report of the job that made the store is left alone; if that job was killed before it could write it, it is
    written now.

    Args:
        root: The store.
        num_parts: Number of the plan's parts.

    Returns:
        The report.
    """
    counts = _attributes(root)["counts"]
    progress = JobProgress(0, 0)
    progress.images, progress.parts = counts["images"], num_parts
    if not root.child(REPORT_FILE).is_file():
        return write_report(root, counts, progress)
    return _summary(root, counts, progress)


def _attributes(root: Location) -> dict[str, Any]:
    attributes: dict[str, Any] = json.loads(root.child(METADATA_FILE).read_bytes())["attributes"]
    return attributes
