"""What the device can reach at best: matrix products, copies, attention at the sizes of the 7B stage and the ViT."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from megatron_deepstack.platform.compute.device import local_device, select_device
from megatron_deepstack.testing.gpu.report import Report, Settings
from megatron_deepstack.testing.gpu.timing import mean_seconds, write_ceiling
from megatron_deepstack.testing.gpu.traces import largest_kernel


def run(settings: Settings, report: Report) -> None:
    """Measure products, copies and attention on random data: with zeros a device takes less power and is faster.

    Args:
        settings: Size and folders of the trial; the reached TFLOP/s are left there for later parts.
        report: Gets a row for each measurement.
    """
    select_device()
    with report.case("matrix product, bf16"):
        _product(settings, report)
    with report.case("copy on the device"):
        _copy(settings, report)
    length = 64 if settings.tiny else 4096
    with report.case("attention of the decoder, causal"):
        _attention(settings, report, "attention of the decoder, causal", (1, 32, length, 128), causal=True)
    views, tokens = (2, 17) if settings.tiny else (50, 577)
    with report.case("attention of the ViT"):
        _attention(settings, report, "attention of the ViT", (views, 16, tokens, 64), causal=False)


def _product(settings: Settings, report: Report) -> None:
    size = 128 if settings.tiny else 8192
    left, right = (torch.randn(size, size, device=local_device(), dtype=torch.bfloat16) for _ in range(2))
    seconds = mean_seconds(partial(torch.matmul, left, right), repeats=20, warm_up=5)
    tflops = 2 * size**3 / seconds / 1e12
    write_ceiling(settings, tflops)
    report.measured("matrix product, bf16", size=f"{size}^3", ms=1000 * seconds, TFLOPs=tflops)


def _copy(settings: Settings, report: Report) -> None:
    num_bytes = (1 if settings.tiny else 4096) << 20
    source = torch.ones(num_bytes, device=local_device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = mean_seconds(partial(target.copy_, source), repeats=10, warm_up=2)
    report.measured("copy on the device", "bytes read and written", GBs=2 * num_bytes / seconds / 1e9)


def _attention(
    settings: Settings, report: Report, what: str, shape: tuple[int, int, int, int], *, causal: bool
) -> None:
    """Forward and backward; a causal one counts half its square."""
    q, k, v = (torch.randn(shape, device=local_device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=local_device(), dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both() -> None:
        torch.autograd.backward(forward(), grad)

    batch, heads, length, width = shape
    flops = 4 * batch * heads * length**2 * width / (2 if causal else 1)
    with torch.no_grad():
        seconds = mean_seconds(forward, repeats=10, warm_up=3)
        kernel = largest_kernel(forward, settings.work)
    all_seconds = mean_seconds(both, repeats=10, warm_up=3)
    report.measured(
        what,
        kernel,
        ms=1000 * seconds,
        TFLOPs=flops / seconds / 1e12,
        backward_ms=1000 * (all_seconds - seconds),
    )
