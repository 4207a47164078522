"""How old a file is by the clock of the file system that holds it.

On a shared folder the server notes when a file was written, and the clock of a machine may differ from the server's by
minutes. So the present time is asked of the file system too: it notes when a new file was written.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path


def age_seconds(file: Path) -> float:
    """Return how long ago a file was written; by this machine's clock if nothing can be written beside it.

    Args:
        file: The file.

    Returns:
        Seconds.

    Raises:
        OSError: There is no such file, or it cannot be looked at.
    """
    written = file.stat().st_mtime
    try:
        with tempfile.TemporaryFile(dir=file.parent, prefix=".age-") as probe:
            probe.write(b"now")
            probe.flush()
            os.fsync(probe.fileno())  # an NFS client may answer from its own clock until the server has the file
            return os.fstat(probe.fileno()).st_mtime - written
    except OSError:
        return time.time() - written
