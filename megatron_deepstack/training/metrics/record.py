"""What is recorded of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step's metrics."""

    step: int
    """Steps done, this one included."""
    loss: float | None
    """Mean loss per target over the global batch; None where no sample had a target."""
    gradient_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    """Tokens of the global batch, visual ones included, padding not."""
    num_images: int
    step_seconds: float
    tokens_per_second: float
    images_per_second: float
    memory_bytes: int
    """Most device memory allocated on rank 0 so far; without a GPU its most resident memory."""
    padding: float = 0.0
    """Share of padding among all positions that the decoder computed, over all replicas."""
    imbalance: float = 0.0
    """Decoder work of the busiest replica above that of the mean replica, as a share of the mean."""
    balance_loss: float | None = None
    """Mean loss per target that balances experts, before it is multiplied by `model.language.balance_loss`. It is
    `num_active_experts` where all experts are equally likely; None for a decoder without experts."""
    busiest_expert: float | None = None
    """Share of the tokens of a layer that chose its busiest expert, in the layer where it is largest."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by part of the step on rank 0."""
    applied: bool = True
    """The optimizer step was carried out: loss and gradients were finite, and there was something to learn."""
    skipped_because: str = ""
    """Why the optimizer step was not carried out; empty if it was."""
    resumed: bool = False
    """First step after a resumption."""
    validation_loss: float | None = None
    """Mean loss per target on held-out samples, where it was measured after this step."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Mean of each score from 0 to 1, where questions were asked after this step."""
    skipped_steps: int = 0
    """Steps left out one after another up to this one; 0 where this one was applied."""
    spike: bool = False
    """The loss stands out of the steps before it (`health.spike_factor`)."""
    samples: tuple[str, ...] = ()
    """Ids of the step's samples, where it was left out or its loss stands out."""
    unreadable: int = 0
    """Samples of this step that could not be read and are left out of its loss."""
    unreadable_samples: tuple[str, ...] = ()
    """Their ids."""
    slow_ranks: tuple[int, ...] = ()
    """Ranks found slow at this step (`health.straggler_factor`)."""
    stall_seconds: float = 0.0
    """Time in which training stood still for a checkpoint since the record before."""
    lr_by_part: Mapping[str, float] = field(default_factory=dict)
    """Learning rate of each part that learns."""
    tokens_per_second_per_rank: float = 0.0
    tflops_per_second: float = 0.0
    """Model TFLOP/s of the whole run, as `planning.budget.cost` counts them."""
    tflops_per_second_per_rank: float = 0.0
    mfu: float | None = None
    """Model FLOP/s over the devices' peak; None where the peak is not known."""

    @property
    def scalars(self) -> Iterator[tuple[str, float]]:
        """Every number of the record with its name, those of mappings as `mapping/key`; what is None is left out."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                yield from ((f"{item.name}/{key}", float(number)) for key, number in value.items())
            elif isinstance(value, int | float):
                yield item.name, float(value)
