"""Everything that a rank of a pool imports, imported once in the process from which ranks are forked.

See `ranks.RankPool`. Importing starts no thread and opens no device, which is what makes the fork safe.
"""

import importlib
import warnings

from megatron_deepstack.platform.compute.megatron_cpu import adapt_megatron
from megatron_deepstack.platform.processes.garbage import settle

_MODULES = ("training.loop", "inference.main", "convert.export", "testing.tiny", "testing.writers")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # each rank has its own rules, and tests import the same modules under theirs
    adapt_megatron()
    for _name in _MODULES:
        importlib.import_module(f"megatron_deepstack.{_name}")
settle()
