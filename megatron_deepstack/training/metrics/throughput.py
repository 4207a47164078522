"""How fast a step was: tokens, images and model FLOP/s of the whole run, and per rank, and their share of the peak.

    TFLOP/s = model FLOPs of the step / step seconds / 10^12        MFU = FLOP/s / (ranks x peak FLOP/s of a device)

Model FLOPs are those of `planning.budget.cost`: ViT, projector and decoder over what the step's samples hold, without
padding and without recomputation. The step's seconds are wall time from one step's end to the next's, waiting for data
included, saving and validation not.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.parallel.reduce import sum_over_replicas
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.budget.cost import training_flops
from megatron_deepstack.platform.compute.device import device_name

_TERA = 1e12
PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    ("B200", 2250, 4500),
    ("H200", 989, 1979),
    ("H100 PCIe", 756, 1513),
    ("H100 NVL", 835, 1671),
    ("H100", 989, 1979),
    ("H800", 989, 1979),
    ("A100", 312, None),
    ("A800", 312, None),
    ("L40S", 362, 733),
    ("L4", 121, 242),
    ("A10G", 70, None),
)
"""Part of the device's name, and its peak TFLOP/s of dense matrix products in bf16 and in FP8, from NVIDIA's data
sheets, which mostly print twice that, for sparse ones. The first entry that fits counts."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A step's rates over the whole run."""

    num_tokens: int
    num_images: int
    tokens_per_second: float
    tokens_per_second_per_rank: float
    images_per_second: float
    tflops_per_second: float
    tflops_per_second_per_rank: float
    mfu: float | None
    """None where the device's peak is not known."""


class Throughput:
    """Measures steps of a run on this rank."""

    def __init__(self, recipe: Recipe, groups: Groups) -> None:
        """Take the run's recipe and its process groups."""
        self.recipe, self.num_ranks = recipe, groups.axes.world_size
        self.peak_tflops = recipe.logging.peak_tflops or peak_tflops(device_name(), recipe.train.precision)

    def of(self, plan: StepPlan, num_tokens: int, num_images: int, seconds: float) -> Speed:
        """Speed of a step, over all replicas. Collective over dp.

        Args:
            plan: The step of this rank's replica.
            num_tokens: Tokens of this replica.
            num_images: Images of this replica.
            seconds: Time that the step took.

        Returns:
            The speed of the whole run.
        """
        recipe = self.recipe
        mine = training_flops(
            recipe.model, recipe.train.trainable, recipe.lora, plan.lengths, plan.num_units, plan.routes.grids
        )
        tokens, images, flops = sum_over_replicas([num_tokens, num_images, mine])
        rate = flops / seconds / _TERA
        return Speed(
            num_tokens=int(tokens),
            num_images=int(images),
            tokens_per_second=tokens / seconds,
            tokens_per_second_per_rank=tokens / seconds / self.num_ranks,
            images_per_second=images / seconds,
            tflops_per_second=rate,
            tflops_per_second_per_rank=rate / self.num_ranks,
            mfu=None if self.peak_tflops is None else rate / self.num_ranks / self.peak_tflops,
        )


def peak_tflops(device: str, precision: Precision) -> float | None:
    """Peak of one device in the precision of the run's matrix products.

    Under fp8 it is the peak of FP8, although ViT, projector, attention and output layer stay in bf16.

    Args:
        device: Name of the device, as the driver reports it.
        precision: The run's precision.

    Returns:
        The peak in TFLOP/s; None where it is not known.
    """
    if precision is Precision.FP32:
        return None
    for name, bf16, fp8 in PEAK_TFLOPS:
        if name.lower() in device.lower():
            return fp8 if precision is Precision.FP8 else bf16
    return None
