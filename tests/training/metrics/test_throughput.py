"""FLOP/s and MFU: the formula, and the devices whose peak is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import LoggingConfig, Recipe, TrainConfig
from megatron_deepstack.planning.budget.cost import decoder_flops, projector_flops, view_flops
from megatron_deepstack.training.metrics import throughput
from megatron_deepstack.training.metrics.throughput import Throughput, peak_tflops

DEVICES = [
    ("NVIDIA H100 80GB HBM3", 989, 1979),
    ("NVIDIA H100 PCIe", 756, 1513),
    ("NVIDIA H200", 989, 1979),
    ("NVIDIA A100-SXM4-80GB", 312, None),
    ("NVIDIA L4", 121, 242),
    ("NVIDIA L40S", 362, 733),
    ("NVIDIA GeForce RTX 3060", None, None),
    ("cpu", None, None),
]


@pytest.mark.parametrize(("device", "bf16", "fp8"), DEVICES, ids=[row[0] for row in DEVICES])
def test_peak_by_device(device: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_tflops(device, Precision.BF16) == bf16
    assert peak_tflops(device, Precision.FP8) == fp8
    assert peak_tflops(device, Precision.FP32) is None


def of_step(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, device: str) -> throughput.Speed:
    """One step of two replicas on 16 ranks in 4 s, each replica with 2 samples of 1024 tokens and 10 views."""
    monkeypatch.setattr(throughput, "device_name", lambda: device)
    monkeypatch.setattr(throughput, "sum_over_replicas", lambda values: [2 * value for value in values])
    groups = SimpleNamespace(axes=SimpleNamespace(world_size=16))
    plan = SimpleNamespace(lengths=(1024, 1024), num_units=10, routes=SimpleNamespace(grids=()))
    return Throughput(recipe, groups).of(plan, num_tokens=2048, num_images=2, seconds=4.0)  # type: ignore[arg-type]


def test_rates_and_mfu_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(train=TrainConfig(trainable=(Part.PROJECTOR, Part.LANGUAGE)))
    speed = of_step(monkeypatch, recipe, "NVIDIA H100 80GB HBM3")
    model, first = recipe.model, 2 * 576 * 1024 * 4096
    replica = 2 * 3 * decoder_flops(model.language, 1024) + 10 * (
        view_flops(model.vision) + 3 * projector_flops(model) - first
    )
    assert speed.tflops_per_second == pytest.approx(2 * replica / 4 / 1e12)
    assert speed.tflops_per_second_per_rank == pytest.approx(2 * replica / 4 / 16 / 1e12)
    assert speed.mfu == pytest.approx(2 * replica / 4 / 16 / 989e12)
    assert (speed.num_tokens, speed.tokens_per_second, speed.tokens_per_second_per_rank) == (4096, 1024, 64)
    assert (speed.num_images, speed.images_per_second) == (4, 1)


def test_mfu_is_none_where_the_peak_is_not_known_and_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_step(monkeypatch, Recipe(), "cpu").mfu is None
    given = of_step(monkeypatch, Recipe(logging=LoggingConfig(peak_tflops=100.0)), "cpu")
    assert given.mfu == pytest.approx(given.tflops_per_second_per_rank / 100.0)
