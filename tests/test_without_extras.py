"""The package on a machine that lacks what only some verbs need: it imports there, and trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = '''
import importlib
import pkgutil
import sys
from pathlib import Path

ABSENT = {"aiohttp", "av", "bokeh", "donfig", "matplotlib", "msgspec", "pandas", "pyarrow", "ray",
          "s3fs", "scipy", "skimage", "transformers", "wandb", "zarr"}


class Without:
    """A finder of modules that does not find those packages, as if they were not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from megatron_deepstack.testing.ranks import be_the_only_rank

be_the_only_rank(Path(sys.argv[1]))
import megatron_deepstack
import orchestration

for package in (megatron_deepstack, orchestration):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        others = ("orchestration.launch.gang.", "megatron_deepstack.convert.hf_folder.",
                  "megatron_deepstack.inference.lmms.")
        if module.name.startswith(others) or module.name.endswith("__main__"):
            continue
        importlib.import_module(module.name)
from megatron_deepstack.testing.tiny import tiny_recipe
from megatron_deepstack.testing.trial import run_trial

losses = run_trial(0, tiny_recipe()).losses
assert len(losses) == 3 and losses[-1] < losses[0], losses
print("trained", ABSENT & set(sys.modules))
'''


@pytest.mark.slow
def test_it_imports_and_trains_without_ray_zarr_bokeh_and_what_else_a_bare_machine_lacks(tmp_path: Path) -> None:
    """Every module but those that Ray, transformers or lmms-eval imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("trained set()\n")
