"""What the planner knows of machines: memory, peak rates, links, and the share of a peak that matrix products reach.

Peaks are of dense products, from NVIDIA's data sheets. Bandwidths are of one GPU in one direction. The shares that are
reached are estimates: `tools/bench_plan.py` compares what follows from them with published utilisations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.problems import did_you_mean
from megatron_deepstack.errors import ConfigError

_GIB: Final = 1 << 30
_CPU: Final = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One kind of device, and how devices are connected."""

    name: str
    memory_bytes: int | None
    """None where the planner does not know it, as on a CPU."""
    bf16_flops: float
    """Peak FLOP/s of dense products in bf16."""
    fp8_flops: float
    fp32_flops: float
    memory_bandwidth: float
    """Bytes per second of the device's memory."""
    node_bandwidth: float
    """Bytes per second between GPUs of one node."""
    network_bandwidth: float
    """Bytes per second of one GPU to other nodes."""
    gpus_per_node: int = 8
    product_share: float = 0.66
    """Share of the peak that large matrix products reach."""
    attention_share: float = 0.45
    """Share of the peak that fused attention reaches, forward and backward together."""
    latency: float = 12e-6
    """Seconds that a message or a collective takes beside its bytes."""
    operator_seconds: float = 0.0
    """Seconds that calling an operator takes where nothing else runs meanwhile, as on a CPU. A GPU works while the host
    launches what comes next."""
    reserved_bytes: int = 5 * _GIB
    """Memory that is not free for tensors: context, communication buffers, workspaces, fragmentation."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a core of a CPU, for runs without a GPU."""
        return self.name == _CPU

    def flops(self, precision: Precision) -> float:
        """Return the peak FLOP/s of the matrix products of a run."""
        return {Precision.FP32: self.fp32_flops, Precision.FP8: self.fp8_flops}.get(precision, self.bf16_flops)


H100: Final = Machine(
    name="h100",
    memory_bytes=80 * 10**9,
    bf16_flops=989e12,
    fp8_flops=1979e12,
    fp32_flops=67e12,
    memory_bandwidth=3.35e12,
    node_bandwidth=370e9,
    network_bandwidth=45e9,
)
MACHINES: Final[Mapping[str, Machine]] = MappingProxyType(
    {
        "h100": H100,
        "h200": Machine(
            name="h200",
            memory_bytes=141 * 10**9,
            bf16_flops=989e12,
            fp8_flops=1979e12,
            fp32_flops=67e12,
            memory_bandwidth=4.8e12,
            node_bandwidth=370e9,
            network_bandwidth=45e9,
        ),
        "a100": Machine(
            name="a100",
            memory_bytes=80 * 10**9,
            bf16_flops=312e12,
            fp8_flops=312e12,
            fp32_flops=19.5e12,
            memory_bandwidth=2.0e12,
            node_bandwidth=235e9,
            network_bandwidth=22e9,
            product_share=0.75,
            attention_share=0.5,
        ),
        "b200": Machine(
            name="b200",
            memory_bytes=180 * 10**9,
            bf16_flops=2250e12,
            fp8_flops=4500e12,
            fp32_flops=80e12,
            memory_bandwidth=8.0e12,
            node_bandwidth=750e9,
            network_bandwidth=45e9,
            product_share=0.62,
        ),
    }
)
CPU: Final = Machine(
    name=_CPU,
    memory_bytes=None,
    bf16_flops=1.2e11,
    fp8_flops=1.2e11,
    fp32_flops=1.2e11,
    memory_bandwidth=2.2e10,
    node_bandwidth=1.3e9,
    network_bandwidth=1e9,
    product_share=0.9,
    attention_share=0.32,
    latency=300e-6,
    operator_seconds=3.4e-6,
    reserved_bytes=0,
)
"""One core of a server, for runs without a GPU: what products, attention, elementwise operators and calls take in the
profile of a small model's step, by the formulas of `durations`."""


def machine_named(name: str) -> Machine:
    """Find a machine.

    Args:
        name: Such as `h100`; case does not matter.

    Returns:
        The machine.

    Raises:
        ConfigError: It is not known; the message names those that are.
    """
    found = MACHINES.get(name.lower())
    if found is None:
        nearest = did_you_mean(name.lower(), tuple(MACHINES))
        raise ConfigError([f"--gpu: found {name!r}, expected one of {', '.join(MACHINES)}{nearest}"])
    return found


def machine_of_device(device: str) -> Machine:
    """Find the machine that a device's name, as the driver gives it, belongs to; the CPU's if none fits."""
    return next((machine for name, machine in MACHINES.items() if name in device.lower()), CPU)
