"""Try this machine's GPU: is training right on it, and how fast is a 7B stage? At most eight minutes on an H100.

Prints a row as soon as it is known. In the folder it leaves results.json (after every part), table.md (at the end, with
the device's name and versions), trace.json.gz (a Chrome trace of one step) and log.txt (all that parts printed).
docs/gpu_trial.md says what each row means. Without a GPU give --tiny: everything at a size that a CPU can take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_deepstack.testing.gpu.catalogue import PARTS, TOTAL_SECONDS, with_needed
from megatron_deepstack.testing.gpu.report import Settings, Verdict
from megatron_deepstack.testing.gpu.runner import Trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for what is kept; must be new or empty")
    parser.add_argument("--tiny", action="store_true", help="run at a size for a CPU")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="longest time of the whole trial")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="only these, and their needs"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} holds files already; name a new or empty folder")
    with tempfile.TemporaryDirectory(prefix="gpu-trial-") as work:
        settings = Settings(tiny=arguments.tiny, work=Path(work), output=arguments.output.resolve())
        trial = Trial(settings, lambda line: print(line, flush=True), arguments.seconds)
        trial.run(with_needed(arguments.parts))
    failed = sum(row.verdict is Verdict.FAILED for row in trial.rows)
    print(f"{len(trial.rows)} rows, {failed} failed; see {arguments.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
