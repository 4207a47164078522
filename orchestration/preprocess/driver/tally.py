"""The share of quarantined images, watched while the job runs: too many stop it, with the list."""

from __future__ import annotations

from typing import Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.quarantine import QUARANTINE_FILE, image_line
from megatron_deepstack.data.store.schema import ImageStatus
from megatron_deepstack.errors import DataError
from orchestration.preprocess.part.finalise import write_quarantine
from orchestration.preprocess.part.work import PartDone

_SHOWN: Final = 10
"""Quarantined images listed in an error."""


class Tally:
    """Counts quarantined images and stops the job when they are too many."""

    def __init__(self, root: Location, num_images: int, max_quarantined: float) -> None:
        self._root = root
        self._num_images = num_images
        self._limit = max_quarantined
        self._found: list[tuple[str, str]] = []

    def add(self, done: PartDone) -> None:
        """Count a part; raises DataError, with the list, once the limit of the whole job is passed."""
        self._found += done.quarantined
        if len(self._found) <= self._limit * self._num_images:
            return
        found = sorted(self._found)
        write_quarantine(self._root, (image_line(ImageStatus.QUARANTINED, path, reason) for path, reason in found))
        listed = "\n  ".join([f"{path}: {reason}" for path, reason in found[:_SHOWN]])
        whole = self._root.child(QUARANTINE_FILE)
        raise DataError(
            f"{len(found)} of {self._num_images} images are quarantined, more than data.max_quarantined allows "
            f"({self._limit:g}):\n  {listed}\nThe whole list so far is {whole}. Repair or replace these images "
            "and preprocess into a new folder, or raise data.max_quarantined and run again: what is done is kept."
        )
