"""`launch` as KubeRay runs it: ends that a new cluster would not change are no failures, so that none is started.

KubeRay treats every exit code except 0 as a failure, and with `backoffLimit` starts whatever failed again. So a run
that was asked to stop would go on, and one with a mistake in its recipe would take cluster after cluster. Such ends
become 0 here and are explained in the log; `megatron-deepstack status` still leaves with the run's own code. This is no
line of shell, as an entrypoint goes through two shells and the quoting of `ray job submit` between them.

    python -m orchestration.manifests.kuberay megatron-deepstack launch RECIPE ...
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from megatron_deepstack.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HealthError,
    PreemptedError,
    StoreError,
)

_SETTLED: Final = {
    PreemptedError.exit_code: "it was asked to stop and has saved; a new job with the same command goes on",
    ConfigError.exit_code: "the recipe is wrong",
    DataError.exit_code: "the data cannot be used",
    StoreError.exit_code: "a store cannot be used",
    CheckpointError.exit_code: "a checkpoint cannot be used",
    HealthError.exit_code: "training went wrong by itself",
}
"""Exit codes that the next attempt would end with too, or that somebody asked for."""


def main(command: Sequence[str]) -> int:
    """Run `command` to its end; returns its exit code, or 0 for an end that is settled.

    `ray job stop` signals every process of a job, so a signal is left to the command, whose end is waited for.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    code = subprocess.call(command)
    if code not in _SETTLED:
        return code if code >= 0 else 128 - code
    print(f"kuberay: launch left with {code}: {_SETTLED[code]}. The job counts as succeeded and is not started again")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
