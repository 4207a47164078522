"""What has to be tried: imports of heavy libraries, devices, Ray. Each in a process of its own, with a deadline.

`python -m orchestration.doctor.probe NAME` prints one JSON document. A library that crashes or hangs takes its own
process with it and no other.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any, Final

LIBRARIES: Final = (
    "numpy",
    "PIL.Image",
    "simplejpeg",
    "google_crc32c",
    "numcodecs",
    "zarr",
    "fsspec",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "omegaconf",
)


def _libraries() -> dict[str, Any]:
    """Imports the smaller libraries; names each beforehand, so that a crash has a name."""
    broken = {}
    for name in LIBRARIES:
        print(f"trying {name}", file=sys.stderr, flush=True)
        try:
            importlib.import_module(name)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return {"broken": broken}


def _torch() -> dict[str, Any]:
    from megatron_deepstack.platform.compute.device import cuda_facts

    return cuda_facts()


def _megatron() -> dict[str, Any]:
    from megatron.core import __version__

    return {"version": __version__}


def _transformer_engine() -> dict[str, Any]:
    module = importlib.import_module("transformer_engine.pytorch")
    return {"version": importlib.import_module("transformer_engine").__version__, "file": module.__file__}


def _apex() -> dict[str, Any]:
    """NVIDIA's; the `apex` of the Python package index is another project."""
    return {"file": importlib.import_module("apex.optimizers").FusedAdam.__module__}


def _ray() -> dict[str, Any]:
    from orchestration.cluster import import_ray, ray_session

    with ray_session(1, None, {}):
        ray = import_ray(None)
        from orchestration.ray_private import worker

        return {"version": ray.__version__, "folder": worker._global_node.get_session_dir_path()}


PROBES: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "libraries": _libraries,
    "torch": _torch,
    "megatron": _megatron,
    "transformer_engine": _transformer_engine,
    "apex": _apex,
    "ray": _ray,
}

if __name__ == "__main__":
    found = PROBES[sys.argv[1]]()
    print("\n" + json.dumps(found), flush=True)
