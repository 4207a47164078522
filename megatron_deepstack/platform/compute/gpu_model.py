"""The model of this machine's GPUs, as the driver tells it without any library."""

from __future__ import annotations

from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpu_model(folder: Path = _DRIVER) -> str | None:
    """Return the model's name, such as `NVIDIA H100 80GB HBM3`; None if there is no GPU of NVIDIA's.

    Args:
        folder: Where the driver describes its devices.
    """
    for file in sorted(folder.glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "Model":
                return value.strip()
    return None
