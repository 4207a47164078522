"""The process of one part: `python -m megatron_deepstack.testing.gpu.process PARENT PART ROWS WORK OUTPUT TINY`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from megatron_deepstack.platform.processes.parent import die_with_parent
from megatron_deepstack.testing.gpu.catalogue import part_named
from megatron_deepstack.testing.gpu.report import Report, Settings


def main(arguments: list[str]) -> None:
    """Run the part. Its rows go to the file ROWS; an exception that it does not report itself ends the process."""
    parent, name, rows, work, output, tiny = arguments
    die_with_parent(int(parent))
    module_name, function = part_named(name).function
    module = importlib.import_module(f"megatron_deepstack.testing.gpu.{module_name}")
    settings = Settings(tiny=tiny == "tiny", work=Path(work), output=Path(output))
    getattr(module, function)(settings, Report(name, Path(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
