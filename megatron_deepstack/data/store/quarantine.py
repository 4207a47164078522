"""`quarantine.jsonl`, the list of what was left out of a store or is flagged in it, and counts of its reasons.

A reason is `KIND: DETAILS`, such as `deep grey: 99.6% of its values are outside 0 to 255 and are cut off`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Final

from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.schema import ImageStatus

QUARANTINE_FILE: Final = "quarantine.jsonl"
_FLAGGED: Final = "image flagged"


def image_line(status: int, path: str, reason: str) -> dict[str, Any]:
    """The line of that list for one image.

    Args:
        status: An ImageStatus, FLAGGED or QUARANTINED.
        path: The image's path as the records give it.
        reason: `KIND: DETAILS`.

    Returns:
        The line's JSON object.
    """
    kind = "image quarantined" if status == ImageStatus.QUARANTINED else _FLAGGED
    return {"kind": kind, "path": path, "reason": reason}


def flagged_by_reason(root: Location) -> dict[str, int]:
    """How many images of a store are flagged for each kind of reason.

    Args:
        root: The store; if it lacks the list, nothing is flagged.

    Returns:
        Number of images by the kind of their reason, the most frequent first.
    """
    try:
        content = root.child(QUARANTINE_FILE).read_bytes()
    except FileNotFoundError:
        return {}
    reasons: dict[str, str] = {}
    for line in content.splitlines():
        document = json.loads(line)
        if document.get("kind") == _FLAGGED:
            reasons[document["path"]] = document["reason"].partition(":")[0]
    return dict(Counter(reasons.values()).most_common())


def in_words(reasons: dict[str, int]) -> str:
    """Reasons and their numbers in one phrase."""
    return ", ".join(f"{kind} {count:,}" for kind, count in reasons.items())
