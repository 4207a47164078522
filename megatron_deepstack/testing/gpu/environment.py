"""What the machine offers: versions, page-locked memory that another process can map, and Transformer Engine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

from megatron_deepstack.platform.compute.device import cuda_facts, device_name, has_gpu
from megatron_deepstack.platform.compute.host_memory import HostMemory
from megatron_deepstack.platform.compute.measure import cudnn_version
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.table import DEVICE

_PACKAGES: Final = ("megatron-core", "numpy", "numcodecs", "simplejpeg", "omegaconf", "transformer-engine")
_QUERY: Final = "name,driver_version,memory.total,clocks.max.sm,power.limit,ecc.mode.current"


def run(settings: Settings, report: Report) -> None:
    """Look at all that needs no training.

    Args:
        settings: Size and folders of the trial.
        report: Gets a row for each subject.
    """
    with report.case(DEVICE):
        facts = cuda_facts()
        report.measured(
            DEVICE,
            device=device_name(),
            python=platform.python_version(),
            torch=str(facts["torch"]),
            cuda=facts["cuda"] or "none",
            nccl=facts["nccl"] or "none",
            cudnn=cudnn_version() or "none",
            **{name: _version(name) for name in _PACKAGES},
        )
    with report.case("nvidia-smi"):
        _nvidia_smi(report)
    with report.case("page-locked host memory"):
        _host_memory(report, (1 if settings.tiny else 1024) << 20)
    _transformer_engine(report)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _nvidia_smi(report: Report) -> None:
    program = shutil.which("nvidia-smi")
    if program is None:
        report.left_out("nvidia-smi", "no such program here")
        return
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    report.measured("nvidia-smi", " / ".join(answer.split("\n")).strip(" /"))


def _host_memory(report: Report, num_bytes: int) -> None:
    """Checkpoints copy through such memory; the first save waits for it."""
    memory = HostMemory()
    begin = time.perf_counter()
    memory.reserve(num_bytes)
    seconds = time.perf_counter() - begin
    memory.close()
    note = "memfd, registered with CUDA" if has_gpu() else "memfd, not page-locked: no GPU"
    report.measured("page-locked host memory", note, MiB=num_bytes >> 20, ms=1000 * seconds)


def _transformer_engine(report: Report) -> None:
    what = "import transformer_engine.pytorch"
    if find_spec("transformer_engine") is None:
        report.left_out(what, "not installed")
        return
    with report.case(what):
        begin = time.perf_counter()
        import_module("transformer_engine.pytorch")
        report.judged(what, True, seconds=time.perf_counter() - begin)
