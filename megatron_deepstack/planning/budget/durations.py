"""How long the parts of a step take on a machine: products, attention, memory traffic, messages and reductions.

Time of a pass = products / (peak x share reached) + attention + bytes of elementwise operators / memory bandwidth
+ collectives of tensor and context parallelism. Shares and bandwidths are `hardware`'s.

Not modelled: overlap of tensor-parallel communication with products (there is none here either), other jobs on the
network, jitter between ranks, the time to launch kernels, and reading data, which is prepared beside the step before.

Legend: T positions of a micro-batch on one rank, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_deepstack.config.choices import EncoderPlacement, Part, Precision, Recompute, RecomputeMethod
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.sizes import expert_layers, padded_vocabulary
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.planning.budget.cost import EncoderWork, encoder_flops
from megatron_deepstack.planning.budget.encoder_views import kept_at_once
from megatron_deepstack.planning.budget.footprint import gradient_bytes
from megatron_deepstack.planning.budget.hardware import Machine
from megatron_deepstack.planning.budget.load import MicroBatchLoad, StepLoad
from megatron_deepstack.planning.budget.memory import head_rows
from megatron_deepstack.planning.budget.parameters import (
    active_matrices,
    encoder_parameters,
    kept_widths,
    stage_parameters,
)
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.slots import Chunk

_SMALL_PRODUCT = 1.5e10
"""FLOPs of a product at which half of the share is lost that large products reach."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """What one rank of the fullest stage sends in a step, by kind, and over which link."""

    tensor: float
    expert: float
    """Tokens to experts on other ranks, there and back."""
    context: float
    pipeline: float
    rows: float
    """Rows of the encoder, there and back."""
    gradients: float
    """Reductions over replicas, and gathering of updated weights."""


class Durations:
    """Seconds of the parts of a recipe's step on one kind of machine."""

    def __init__(self, recipe: Recipe, load: StepLoad, machine: Machine, num_ranks: int) -> None:
        self.recipe, self.load, self.machine, self.num_ranks = recipe, load, machine, num_ranks
        parallel, language = recipe.parallel, recipe.model.language
        self.element = 4 if recipe.train.precision is Precision.FP32 else 2
        self.peak = machine.flops(recipe.train.precision)
        self.matrices = active_matrices(recipe.model, parallel.tensor)
        self.vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        self.w, self.k, self.f = kept_widths(recipe.model, parallel.tensor)
        self.learns = Part.LANGUAGE in recipe.train.trainable
        self.flows = self.learns or Part.PROJECTOR in recipe.train.trainable or Part.VISION in recipe.train.trainable

    def forward(self, batch: MicroBatchLoad, chunk: Chunk) -> float:
        """Seconds of the forward pass of a micro-batch through a chunk.

        Args:
            batch: The micro-batch.
            chunk: The chunk.

        Returns:
            Seconds.
        """
        return (
            (chunk.stop - chunk.first) * self._layer(batch)
            + chunk.has_head * self._head(batch)
            + self._inline(batch, chunk)
        )

    def backward(self, batch: MicroBatchLoad, chunk: Chunk) -> float:
        """Seconds of the backward pass, recomputation included.

        Args:
            batch: The micro-batch.
            chunk: The chunk.

        Returns:
            Seconds.
        """
        if not self.flows:
            return 0.0
        layers, parallel = chunk.stop - chunk.first, self.recipe.parallel
        passes = 2 if self.learns and not self.recipe.lora.rank else 1
        again = 0.0
        if parallel.recompute is Recompute.FULL:
            block = parallel.recompute_method is RecomputeMethod.BLOCK
            again = min(parallel.recompute_num_layers, layers) if block else layers
        attention = self._attention(batch) * (parallel.recompute is Recompute.SELECTIVE)
        work = layers * (passes * self._products(batch) + 2 * self._attention(batch) + 2 * self._traffic(batch))
        work += layers * (self._collectives(batch) + attention) + again * self._layer(batch)
        head = chunk.has_head * (1 + self.learns) * self._head(batch)
        return work + head + 2 * self._inline(batch, chunk)

    def message(self, batch: MicroBatchLoad) -> float:
        """Seconds from the end of a pass to the arrival of its output at the next stage."""
        return self.machine.latency + self.message_bytes(batch) / self._link(self._between_stages())

    def message_bytes(self, batch: MicroBatchLoad) -> float:
        """Bytes of one message between stages."""
        return self._split(batch) * self.recipe.model.language.hidden_size * self.element

    def encode(self) -> tuple[float, float]:
        """Seconds of the encoder's forward and backward outside the schedule, routing of rows included."""
        if self.recipe.parallel.encoder_placement is EncoderPlacement.INLINE:
            return 0.0, 0.0
        ranks = model_ranks(self.recipe.parallel)
        forward, backward = self._encoder(self.load.share)
        route = self.machine.latency * (ranks > 1) + self.route_bytes() / self._link(ranks)
        return forward + route, (backward + route) if self.flows else 0.0

    def route_bytes(self) -> float:
        """Bytes of rows that one rank sends on average, in one direction."""
        ranks = model_ranks(self.recipe.parallel)
        rows = sum(self.load.rows_per_unit.values()) * self.load.units
        return rows / ranks * self.recipe.model.language.hidden_size * self.element * (ranks - 1) / ranks

    def reduce(self, stage: int) -> float:
        """Seconds of the gradients' reduction over replicas, and of gathering weights; without overlap."""
        return sum(
            num_bytes / self._link(ranks) + 2 * self.machine.latency
            for num_bytes, ranks in self._reductions(stage)
            if ranks > 1
        )

    def reduced_bytes(self, stage: int) -> float:
        """Bytes that one rank sends for them."""
        return sum(num_bytes for num_bytes, ranks in self._reductions(stage) if ranks > 1)

    def update(self, stage: int) -> float:
        """Seconds of the optimizer: weights, gradients and states are read and written once."""
        parallel = self.recipe.parallel
        shares = self.num_ranks // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
        everyone = self.num_ranks if parallel.distributed_optimizer else 1
        decoder, expert_shares = stage_parameters(self.recipe, stage), self._expert_replicas()
        learned = (decoder.learned - decoder.experts_learned) / shares
        learned += decoder.experts_learned / (expert_shares if parallel.distributed_optimizer else 1)
        learned += encoder_parameters(self.recipe).learned / everyone
        return learned * 34 / self.machine.memory_bandwidth + 20 * self.machine.latency

    def bytes_of_stage(self, stage: int, layers: int) -> Bytes:
        """What a rank of a stage with so many layers sends in a step.

        Args:
            stage: Number of the stage.
            layers: Its number of decoder layers.

        Returns:
            The bytes by kind.
        """
        parallel = self.recipe.parallel
        batches = self.load.micro_batches
        passes = 3 if parallel.recompute is Recompute.FULL else 2
        neighbours = (2 if 0 < stage < parallel.pipeline - 1 else 1) * (parallel.pipeline > 1)
        return Bytes(
            tensor=passes * layers * sum(self._tensor_bytes(batch) for batch in batches),
            expert=passes * layers * sum(self._dispatch_bytes(batch) for batch in batches),
            context=passes * layers * sum(self._context_bytes(batch) for batch in batches),
            pipeline=neighbours * parallel.virtual_pipeline * sum(self.message_bytes(batch) for batch in batches),
            rows=2 * self.route_bytes(),
            gradients=self.reduced_bytes(stage),
        )

    def _layer(self, batch: MicroBatchLoad) -> float:
        return self._products(batch) + self._attention(batch) + self._traffic(batch) + self._collectives(batch)

    def _positions(self, batch: MicroBatchLoad) -> float:
        return batch.positions / self.recipe.parallel.context

    def _split(self, batch: MicroBatchLoad) -> float:
        parallel = self.recipe.parallel
        return self._positions(batch) / (parallel.tensor if parallel.sequence_parallel else 1)

    def _product_seconds(self, flops: float, count: int) -> float:
        """Seconds of `count` products of so many FLOPs together; small ones reach less of the peak."""
        each = flops / max(count, 1)
        share = self.machine.product_share * each / (each + _SMALL_PRODUCT * self.peak / 1e15)
        return flops / (self.peak * share) if flops else 0.0

    def _products(self, batch: MicroBatchLoad) -> float:
        return self._product_seconds(2 * self._positions(batch) * self.matrices, 4)

    def _attention(self, batch: MicroBatchLoad) -> float:
        """Seconds of causal attention, of which half of the square is computed."""
        parallel = self.recipe.parallel
        return 2 * batch.squares / parallel.context * self.w / (self.machine.bf16_flops * self.machine.attention_share)

    def _traffic(self, batch: MicroBatchLoad) -> float:
        """Seconds of norms, additions, rotations and activations, which move bytes and compute little."""
        inner = self._positions(batch) * (2 * (self.w + 2 * self.k) + 3 * self.f)
        values = self._split(batch) * 10 * self.recipe.model.language.hidden_size + inner
        return values * self.element / (0.8 * self.machine.memory_bandwidth)

    def _tensor_bytes(self, batch: MicroBatchLoad) -> float:
        """Bytes that a rank sends for one pass of a layer: two gathers and two scatters, or two reductions."""
        ranks = self.recipe.parallel.tensor
        hidden = self._positions(batch) * self.recipe.model.language.hidden_size * self.element
        return 4 * hidden * (ranks - 1) / ranks

    def _context_bytes(self, batch: MicroBatchLoad) -> float:
        return 2 * self.k * self._positions(batch) * self.element * (self.recipe.parallel.context - 1)

    def _collectives(self, batch: MicroBatchLoad) -> float:
        parallel, found = self.recipe.parallel, 0.0
        if parallel.tensor > 1:
            found += self._tensor_bytes(batch) / self._link(parallel.tensor) + 4 * self.machine.latency
        if parallel.context > 1:  # of the ring's messages half hide behind attention
            seconds = self._context_bytes(batch) / self._link(parallel.tensor * parallel.context)
            found += seconds / 2 + self.machine.latency
        if parallel.expert > 1:
            found += self._dispatch_bytes(batch) / self._link(parallel.expert) + 2 * self.machine.latency
        return found

    def _head(self, batch: MicroBatchLoad) -> float:
        positions = head_rows(self.recipe.parallel, batch)
        flops = 2 * positions * self.vocabulary * self.recipe.model.language.hidden_size
        traffic = positions * self.vocabulary * (self.element + 12) / (0.8 * self.machine.memory_bandwidth)
        return self._product_seconds(flops, 1) + traffic

    def _inline(self, batch: MicroBatchLoad, chunk: Chunk) -> float:
        if self.recipe.parallel.encoder_placement is not EncoderPlacement.INLINE or not chunk.has_embedding:
            return 0.0
        forward, backward = self._encoder(batch.work)
        return (forward + backward) / 3

    def _encoder(self, work: EncoderWork) -> tuple[float, float]:
        """Seconds of the encoder's forward and backward on one rank."""
        model, trainable = self.recipe.model, self.recipe.train.trainable
        tower, projector = encoder_flops(model, work)
        forward, backward = tower + projector, 0.0
        if Part.PROJECTOR in trainable:
            backward += (1 if self.recipe.lora.projector else 2) * projector
        elif Part.VISION in trainable:  # its gradient passes
            backward += projector
        if Part.VISION in trainable:
            backward += (1 if self.recipe.lora.vision_targets else 2) * tower  # a frozen matrix has no gradient
            at_once = kept_at_once(self.recipe.parallel, model.vision, self.element)
            backward += tower * (at_once.share(work.views, work.patches) < 1)
        traffic = work.patches * 60 * model.vision.hidden_size * model.vision.num_layers
        if model.variant.traits.stack_source is StackSource.TAPS:  # norms, windows and copies of each stack
            traffic += work.patches * 60 * model.vision.hidden_size * len(model.vision.taps)
        moved = traffic * self.element / 4 / self.machine.memory_bandwidth
        reached = self.peak * self.machine.product_share * 0.75
        return forward / reached + moved, backward / reached + 2 * moved * (backward > 0)

    def _reductions(self, stage: int) -> list[tuple[float, int]]:
        """Bytes of the reductions of decoder and encoder, and over how many ranks."""
        parallel = self.recipe.parallel
        replicas = self.num_ranks // (parallel.tensor * parallel.pipeline)
        decoder, found = stage_parameters(self.recipe, stage), []
        for learned, ranks in (
            (decoder.learned - decoder.experts_learned, replicas),
            (decoder.experts_learned, self._expert_replicas()),
            (encoder_parameters(self.recipe).learned, self.num_ranks),
        ):
            gradient = gradient_bytes(self.recipe)
            weights = self.element if parallel.distributed_optimizer else gradient
            found.append((learned * (gradient + weights) * (ranks - 1) / ranks, ranks))
        return found

    def _expert_replicas(self) -> int:
        """Ranks of a stage that hold the same experts."""
        parallel = self.recipe.parallel
        return self.num_ranks // (parallel.expert * parallel.pipeline)

    def _dispatch_bytes(self, batch: MicroBatchLoad) -> float:
        """Bytes that a rank sends for one pass of a layer with experts: tokens to them, and their answers back."""
        language, ranks = self.recipe.model.language, self.recipe.parallel.expert
        share = len(expert_layers(language)) / language.num_layers * language.num_active_experts
        own = self._positions(batch) / self.recipe.parallel.tensor
        return 2 * share * own * language.hidden_size * self.element * (ranks - 1) / ranks

    def _between_stages(self) -> int:
        """Ranks from one stage to the next, which decide whether messages leave a node."""
        return self.recipe.parallel.tensor * self.recipe.parallel.context * 2

    def _link(self, ranks: int) -> float:
        """Bytes per second of a group: within a node if so many ranks fit in one."""
        inside = min(ranks, self.num_ranks) <= self.machine.gpus_per_node
        return self.machine.node_bandwidth if inside else self.machine.network_bandwidth
