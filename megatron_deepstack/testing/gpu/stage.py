"""A pipeline stage of a 7B model on one device: eight of its layers with embedding and head, four stacks, drawn rows.

It is what a rank runs between two exchanges: the schedule over eight micro-batches, forward and backward, with
gradients of the rows. The vision tower is left out (`vision` measures it), weights are drawn on the device.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_deepstack.config.choices import Fp8Scaling, Layers, Part, Precision, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SpeedConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.model.build import AUTOMATIC, build_model, freeze
from megatron_deepstack.model.rules import Shape, fill
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.batch.packing import merge
from megatron_deepstack.planning.batch.step_plan import StepPlan, plan_step
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.cost import training_flops
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.platform.compute.device import local_device, max_memory_bytes
from megatron_deepstack.platform.compute.measure import release_memory
from megatron_deepstack.platform.compute.stopwatch import Stopwatch
from megatron_deepstack.step.engine import build_engine
from megatron_deepstack.step.schedule import run_schedule
from megatron_deepstack.step.visual import ReceivedRows
from megatron_deepstack.testing.tiny import TinySample
from megatron_deepstack.training.optim.optimizer import Optimizer

_TRAINABLE: Final = (Part.LANGUAGE,)
_DEVIATION: Final = 0.02
_GRID: Final = (2, 2)
_ALONE: Final = ParallelConfig()
_OPTIMIZER: Final = OptimizerConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSize:
    """How large the stage is, and its step."""

    language: LanguageConfig
    vision: VisionConfig
    tokens_per_image: int
    """Tokens of a row for each of its images, the image's own included."""
    seq_lengths: tuple[int, ...]
    """Lengths of rows to measure, the one to compare variants at first."""
    micro_batches: int
    repeats: int


def stage_size(*, tiny: bool) -> StageSize:
    """A quarter of Vicuna 7B under CLIP ViT-L/336, or the same thing tiny."""
    if not tiny:
        return StageSize(
            language=LanguageConfig(num_layers=8),
            vision=VisionConfig(),
            tokens_per_image=1024,
            seq_lengths=(4096, 2048),
            micro_batches=8,
            repeats=3,
        )
    return StageSize(
        language=LanguageConfig(vocab_size=64, hidden_size=32, ffn_hidden_size=64, num_layers=4, num_heads=4),
        vision=VisionConfig(image_size=16, patch_size=4, hidden_size=16, ffn_hidden_size=32, num_layers=2, num_heads=2),
        tokens_per_image=24,
        seq_lengths=(96, 48),
        micro_batches=2,
        repeats=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What a step took."""

    seconds: float
    tflops: float
    """Per second, model FLOPs: recomputation does not count."""
    tokens_per_second: float
    peak_bytes: int

    def numbers(self, ceiling: float | None) -> dict[str, float]:
        """For a row of the table; `ceiling` in TFLOP/s."""
        numbers = {
            "ms": 1000 * self.seconds,
            "TFLOPs": self.tflops,
            "tokens_per_s": self.tokens_per_second,
            "peak_GB": self.peak_bytes / 1e9,
        }
        return numbers | ({} if ceiling is None else {"share_of_ceiling": self.tflops / ceiling})


class Stage:
    """A built stage with its optimizer."""

    def __init__(
        self,
        groups: Groups,
        size: StageSize,
        layers: Layers,
        *,
        parallel: ParallelConfig = _ALONE,
        optimizer: OptimizerConfig = _OPTIMIZER,
        precision: Precision = Precision.BF16,
        speed: SpeedConfig = AUTOMATIC,
    ) -> None:
        """Build the stage and draw its weights on the device.

        Args:
            groups: Those of a world of one rank.
            size: How large it is.
            layers: Whose layers are built.
            parallel: Which activations are computed again, and whether the optimizer is distributed.
            optimizer: In which number format it keeps its moments.
            precision: Of parameters and products.
            speed: Which fusions are used.
        """
        self.size, self.groups, self.precision = size, groups, precision
        self.model = ModelConfig(vision=size.vision, language=size.language, stacks=StackConfig(start=0), layers=layers)
        self.parallel = parallel
        scaling = Fp8Scaling.TENSORWISE
        rank_model = build_model(self.model, self.parallel, precision, groups, fp8_scaling=scaling, speed=speed)
        for chunk, rules in zip(rank_model.chunks, rank_model.chunk_rules, strict=True):
            fill(chunk, rules, draw_on_device, 0, 1)
        fill(rank_model.encoder, rank_model.encoder_rules, draw_on_device, 0, 1)
        freeze(rank_model, _TRAINABLE)
        self.engine = build_engine(rank_model, self.model, self.parallel, groups)
        self.optimizer = Optimizer(self.engine, optimizer, precision, 1000)
        self.steps_done = 0

    def plan(self, seq_length: int, *, stacks: bool = True, packed: bool = False) -> StepPlan:
        """A step of full rows, each with an image for every `tokens_per_image` of its tokens.

        Args:
            seq_length: Tokens of a row.
            stacks: Whether images have stacks; without them they have base rows only.
            packed: Whether a row is a pack of samples with one image each, in place of one sample.

        Returns:
            The step of the only rank.
        """
        images = seq_length // self.size.tokens_per_image
        samples_per_row = images if packed else 1
        model = self.model if stacks else replace(self.model, variant=Variant.LLAVA)
        rng = np.random.default_rng(0)
        rows = [
            [self._sample(rng, model, seq_length // samples_per_row, images // samples_per_row)] * samples_per_row
            for _ in range(self.size.micro_batches)
        ]
        merged = [[merge(row)] if packed else row for row in rows]
        return plan_step(model, self.parallel, merged, 0, packed=packed, precision=self.precision)

    def _sample(self, rng: np.random.Generator, model: ModelConfig, length: int, images: int) -> PlannedSample:
        written = length - images * (tokens_per_view(self.size.vision) - 1)
        tokens = rng.integers(1, self.size.language.vocab_size, written)
        tokens[1 : 1 + images] = IMAGE_TOKEN_ID
        mask = (tokens != IMAGE_TOKEN_ID).astype(np.int64)
        return TinySample(tokens, mask, (_GRID,) * images, ()).planned(model, length)

    def rows(self, plan: StepPlan) -> torch.Tensor:
        """Rows as if received: (len(stored_rows), H)."""
        shape = (len(plan.routes.stored_rows), self.size.language.hidden_size)
        return torch.randn(shape, device=local_device(), dtype=torch.bfloat16)

    def forward_backward(self, plan: StepPlan, stored: torch.Tensor) -> torch.Tensor:
        """Run a step's schedule and finish its gradients, which stay in the buffers for `update`.

        Args:
            plan: The step.
            stored: (len(stored_rows), H) as `rows` draws them; overwritten.

        Returns:
            The rows' gradients, (len(stored_rows), H), in the storage of `stored`.
        """
        if self.engine.graphs is not None:
            self.engine.graphs.before_step(plan)
        for ddp in self.engine.wrapped:
            ddp.zero_grad_buffer()
        received = ReceivedRows(stored, plan.routes, requires_grad=True)
        result = run_schedule(self.engine.model.config, self.engine.chunks, plan, received.of, cp_rank=0)
        finalize_model_grads(self.engine.decoder_ddp, None)
        for ddp in self.engine.wrapped:
            ddp.scale_gradients(1.0 / int(result.num_tokens))
        return received.take_gradients()

    def update(self) -> None:
        """An optimizer step with the gradients of the last schedule."""
        self.optimizer.step(self.steps_done)
        self.steps_done += 1

    def state_bytes(self) -> int:
        """Bytes of the optimizer's states: moments and, where it keeps them, main parameters."""
        states = (
            tensor
            for single in self.optimizer.chained.chained_optimizers
            for of_parameter in single.optimizer.state.values()
            for tensor in of_parameter.values()
        )
        return sum(tensor.nbytes for tensor in states if isinstance(tensor, torch.Tensor))

    def speed(self, plan: StepPlan) -> Speed:
        """Median of some steps' forward and backward, after two others."""
        release_memory()
        watch, taken = Stopwatch(), []
        for index in range(self.size.repeats + 2):
            stored = self.rows(plan)
            watch.start()
            self.forward_backward(plan, stored)
            watch.stop()
            seconds = watch.take()
            if index >= 2:
                taken.append(seconds)
        seconds = statistics.median(taken)
        flops = training_flops(self.model, _TRAINABLE, LoraConfig(), plan.lengths, 0)
        return Speed(
            seconds=seconds,
            tflops=flops / seconds / 1e12,
            tokens_per_second=sum(plan.lengths) / seconds,
            peak_bytes=max_memory_bytes(),
        )


def draw_on_device(name: str, shape: Shape) -> torch.Tensor:
    """Weights drawn on this rank's device: norms 1, biases 0, all else normal. They are not those of a run's seed.

    Args:
        name: The tensor's published name.
        shape: Its shape.

    Returns:
        float32 of that shape.
    """
    if len(shape) == 1:
        fill_value = 0.0 if name.endswith(".bias") else 1.0
        return torch.full(shape, fill_value, device=local_device())
    return torch.randn(shape, device=local_device()) * _DEVIATION
