"""What this process can use to compute faster, as one record: a GPU, Transformer Engine, Apex's kernels, a compiler.

Decisions about fusions take this record and ask nothing themselves, so a test can say what a GPU would have.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_deepstack.platform.compute.device import has_gpu
from megatron_deepstack.platform.compute.transformer_engine import engine_problem

_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
"""Apex's extension that adds a weight's gradient to a buffer in the matrix product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What one process can use. Problems are clauses for a message, None where there is none."""

    gpu: bool
    """Whether it sees a GPU."""
    engine_problem: str | None
    """Why Transformer Engine cannot be used, apart from a missing GPU."""
    apex_gradients: bool
    """Whether Apex's kernel for gradient accumulation is installed."""
    compiler_problem: str | None
    """Why `torch.compile` cannot build kernels."""


@cache
def capabilities() -> Capabilities:
    """Return what this process can use. The first call may import Transformer Engine."""
    gpu = has_gpu()
    return Capabilities(
        gpu=gpu,
        engine_problem=engine_problem(),
        apex_gradients=find_spec(_GRADIENT_KERNEL) is not None,
        compiler_problem=_compiler_problem(gpu),
    )


def _compiler_problem(gpu: bool) -> str | None:
    """`torch.compile` builds C++ on a CPU; on a GPU it needs Triton, which builds a small C extension of Python."""
    names = ("cc", "gcc", "clang") if gpu else ("g++", "c++", "clang++")
    variable = "CC" if gpu else "CXX"
    if variable not in os.environ and not any(map(shutil.which, names)):
        return f"no compiler is installed (one of {', '.join(names)}, or the variable {variable})"
    if gpu and find_spec("triton") is None:
        return "the package triton is not installed"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Python's header files are not installed ({header})"
    return None
