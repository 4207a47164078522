"""How long the parts of a step take on a machine: products, attention, memory traffic, messages and reductions.

Time of a pass = products / (peak x share reached) + attention + bytes of elementwise operators / memory bandwidth
+ collectives of tensor and context parallelism; on a CPU + calls of operators, and in the backward + gradients that are
added to those of micro-batches before. Shares and bandwidths are `hardware`'s.

Not modelled: overlap of tensor-parallel communication with products (there is none here either), other jobs on the
network, jitter between ranks, the time to launch kernels on a GPU, norms and activations that are computed again,
activations on their way to the host and back, and reading data, which is prepared beside the step before.

Legend: M micro-batches of a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron_deepstack.config.choices import (
    EncoderPlacement,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.sizes import expert_layers, padded_vocabulary, recomputed_modules
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.planning.budget.cost import EncoderWork, encoder_flops
from megatron_deepstack.planning.budget.encoder_views import kept_at_once
from megatron_deepstack.planning.budget.footprint import gradient_bytes
from megatron_deepstack.planning.budget.hardware import Machine
from megatron_deepstack.planning.budget.load import Costs, MicroBatches, StepLoad
from megatron_deepstack.planning.budget.memory import head_rows
from megatron_deepstack.planning.budget.parameters import (
    active_matrices,
    encoder_parameters,
    kept_widths,
    parameters_of_chunk,
    parameters_of_stages,
)
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.exchange.vit_stacks import view_layers
from megatron_deepstack.planning.slots import Chunk

_SMALL_PRODUCT: Final = 1.5e10
"""FLOPs of a product at which half of the share is lost that large products reach."""
_LAYER_OPERATORS: Final = (70, 131)
"""Operators of a layer's forward and backward pass where Transformer Engine does not join them, views included, counted
with torch's dispatcher."""
_OTHER_OPERATORS: Final = 160
"""The same of a micro-batch outside the layers: embedding, output layer, loss; forward and backward together."""


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
    """Seconds of the parts of a recipe's step on one kind of machine. Those of a pass are float64 (M,), for all M."""

    def __init__(self, recipe: Recipe, load: StepLoad, machine: Machine, num_ranks: int) -> None:
        self.recipe, self.load, self.machine, self.num_ranks = recipe, load, machine, num_ranks
        self.held, self.encoder = parameters_of_stages(recipe), encoder_parameters(recipe)
        parallel, language, batches = recipe.parallel, recipe.model.language, load.micro_batches
        self.element = 4 if recipe.train.precision is Precision.FP32 else 2
        self.peak = machine.flops(recipe.train.precision)
        self.matrices = active_matrices(recipe.model, parallel.tensor)
        self.vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        self.w, self.k, self.f = kept_widths(recipe.model, parallel.tensor)
        self.learns = Part.LANGUAGE in recipe.train.trainable
        self.flows = self.learns or Part.PROJECTOR in recipe.train.trainable or Part.VISION in recipe.train.trainable
        self.positions: Costs = batches.positions / parallel.context
        self.split: Costs = self.positions / (parallel.tensor if parallel.sequence_parallel else 1)
        self.products = self._product_seconds(2 * self.positions * self.matrices, 4)
        self.mlp = self.products * (3 * language.hidden_size * self.f / self.matrices)
        """Of the products those of the MLP, or of the experts in its place."""
        self.attention = self._attention(batches)
        self.traffic = self._traffic()
        self.collectives = self._collectives()
        self.calls, self.calls_back = (number * machine.operator_seconds for number in _LAYER_OPERATORS)
        """Seconds of calling a layer's operators, forward and backward."""
        self.other_calls = _OTHER_OPERATORS * machine.operator_seconds
        self.layer = self.products + self.attention + self.traffic + self.collectives + self.calls
        self.head = self._head(batches)
        self.inline = self._inline(batches)
        self._passes: dict[tuple[int, bool, bool], tuple[Costs, Costs]] = {}

    def passes(self, chunk: Chunk) -> tuple[Costs, Costs]:
        """Seconds of the forward and backward passes of each micro-batch through a chunk.

        Args:
            chunk: The chunk.

        Returns:
            Two arrays, float64 (M,), shared by chunks that are alike.
        """
        kind = chunk.stop - chunk.first, chunk.has_embedding, chunk.has_head
        if kind not in self._passes:
            self._passes[kind] = self._forward(chunk), self._backward(chunk)
        return self._passes[kind]

    def _forward(self, chunk: Chunk) -> Costs:
        found = (chunk.stop - chunk.first) * self.layer
        if chunk.has_head:
            found = found + self.head + self.other_calls / 3
        return found + self.inline if chunk.has_embedding else found

    def _backward(self, chunk: Chunk) -> Costs:
        """Seconds of backward passes, recomputation included."""
        if not self.flows:
            return np.zeros_like(self.layer)
        layers, parallel = chunk.stop - chunk.first, self.recipe.parallel
        passes = 2 if self.learns and not self.recipe.lora.rank else 1
        again = 0.0
        if parallel.recompute is Recompute.FULL:
            block = parallel.recompute_method is RecomputeMethod.BLOCK
            again = min(parallel.recompute_num_layers, layers) if block else layers
        parts = recomputed_modules(parallel)
        selective = self.attention * (RecomputeModule.CORE_ATTENTION in parts)
        selective = selective + self.mlp * (RecomputeModule.MLP in parts)
        work = layers * (passes * self.products + 2 * self.attention + 2 * self.traffic)
        work = work + layers * (self.collectives + selective + self.calls_back) + again * self.layer
        work = work + self._added_gradients(chunk)
        if chunk.has_head:
            work = work + (1 + self.learns) * self.head + self.other_calls * 2 / 3
        return work + 2 * self.inline if chunk.has_embedding else work

    def _added_gradients(self, chunk: Chunk) -> float:
        """Seconds of adding a micro-batch's gradients to their sums, which GPU packages do within the products."""
        if not self.machine.is_cpu:
            return 0.0
        read_and_written = 3 * gradient_bytes(self.recipe) * parameters_of_chunk(self.recipe, chunk).learned
        return read_and_written / (0.8 * self.machine.memory_bandwidth)

    def message(self) -> float:
        """Seconds from the end of the first micro-batch's pass to the arrival of its output at the next stage."""
        return self.machine.latency + float(self._message_bytes()[0]) / self._link(self._between_stages())

    def _message_bytes(self) -> Costs:
        """Bytes of one message between stages, of each micro-batch."""
        return self.split * self.recipe.model.language.hidden_size * self.element

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
        decoder, expert_shares = self.held[stage], self._expert_replicas()
        learned = (decoder.learned - decoder.experts_learned) / shares
        learned += decoder.experts_learned / (expert_shares if parallel.distributed_optimizer else 1)
        learned += self.encoder.learned / everyone
        return learned * 34 / self.machine.memory_bandwidth + 20 * self.machine.latency

    def bytes_of_stages(self, layers: Sequence[int]) -> list[Bytes]:
        """What a rank of each stage sends in a step.

        Args:
            layers: Each stage's number of decoder layers.

        Returns:
            The bytes by kind, stage by stage.
        """
        parallel = self.recipe.parallel
        passes = 3 if parallel.recompute is Recompute.FULL else 2
        kinds = self._tensor_bytes(), self._dispatch_bytes(), self._context_bytes()
        tensor, expert, context = (passes * float(one.sum()) for one in kinds)
        message = parallel.virtual_pipeline * float(self._message_bytes().sum())
        rows, found = 2 * self.route_bytes(), []
        for stage, number in enumerate(layers):
            neighbours = (2 if 0 < stage < parallel.pipeline - 1 else 1) * (parallel.pipeline > 1)
            sums = number * tensor, number * expert, number * context, neighbours * message
            found.append(Bytes(*sums, rows, self.reduced_bytes(stage)))
        return found

    def _product_seconds(self, flops: Costs, count: int) -> Costs:
        """Seconds of `count` products of so many FLOPs together; small ones reach less of the peak."""
        each = flops / count
        share = self.machine.product_share * each / (each + _SMALL_PRODUCT * self.peak / 1e15)
        return flops / (self.peak * share)

    def _attention(self, batches: MicroBatches) -> Costs:
        """Seconds of causal attention, of which half of the square is computed."""
        parallel = self.recipe.parallel
        reached = self.machine.bf16_flops * self.machine.attention_share
        return 2 * batches.squares / parallel.context * self.w / reached

    def _traffic(self) -> Costs:
        """Seconds of norms, additions, rotations and activations, which move bytes and compute little."""
        inner = self.positions * (2 * (self.w + 2 * self.k) + 3 * self.f)
        values = self.split * 10 * self.recipe.model.language.hidden_size + inner
        return values * self.element / (0.8 * self.machine.memory_bandwidth)

    def _tensor_bytes(self) -> Costs:
        """Bytes that a rank sends for one pass of a layer: two gathers and two scatters, or two reductions."""
        ranks = self.recipe.parallel.tensor
        hidden = self.positions * self.recipe.model.language.hidden_size * self.element
        return 4 * hidden * (ranks - 1) / ranks

    def _context_bytes(self) -> Costs:
        return 2 * self.k * self.positions * self.element * (self.recipe.parallel.context - 1)

    def _collectives(self) -> Costs:
        parallel, found = self.recipe.parallel, np.zeros_like(self.positions)
        if parallel.tensor > 1:
            found += self._tensor_bytes() / self._link(parallel.tensor) + 4 * self.machine.latency
        if parallel.context > 1:  # of the ring's messages half hide behind attention
            seconds = self._context_bytes() / self._link(parallel.tensor * parallel.context)
            found += seconds / 2 + self.machine.latency
        if parallel.expert > 1:
            found += self._dispatch_bytes() / self._link(parallel.expert) + 2 * self.machine.latency
        return found

    def _head(self, batches: MicroBatches) -> Costs:
        positions = head_rows(self.recipe.parallel, batches)
        flops = 2 * positions * self.vocabulary * self.recipe.model.language.hidden_size
        traffic = positions * self.vocabulary * (self.element + 12) / (0.8 * self.machine.memory_bandwidth)
        return self._product_seconds(flops, 1) + traffic

    def _inline(self, batches: MicroBatches) -> Costs:
        """Seconds that the encoder adds to a forward pass of the first stage; its backward takes twice as long."""
        if self.recipe.parallel.encoder_placement is not EncoderPlacement.INLINE:
            return np.zeros_like(self.positions)
        return np.array([sum(self._encoder(work)) / 3 for work in batches.work])

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
            at_once = kept_at_once(model, self.recipe.parallel, self.element)
            backward += tower * (at_once.share(work.views, work.patches) < 1)
        native = model.variant.traits.is_native
        passed = model.vision.num_layers * work.views if native else view_layers(model, work.views, work.units)
        traffic = passed * work.patches / max(work.views, 1) * 60 * model.vision.hidden_size
        if model.variant.traits.stack_source is StackSource.TAPS:  # norms, windows and copies of each stack
            traffic += work.patches * 60 * model.vision.hidden_size * len(model.vision.taps)
        moved = traffic * self.element / 4 / self.machine.memory_bandwidth
        reached = self.peak * self.machine.product_share * 0.75
        return forward / reached + moved, backward / reached + 2 * moved * (backward > 0)

    def _reductions(self, stage: int) -> list[tuple[float, int]]:
        """Bytes of the reductions of decoder and encoder, and over how many ranks."""
        parallel = self.recipe.parallel
        replicas = self.num_ranks // (parallel.tensor * parallel.pipeline)
        decoder, found = self.held[stage], []
        for learned, ranks in (
            (decoder.learned - decoder.experts_learned, replicas),
            (decoder.experts_learned, self._expert_replicas()),
            (self.encoder.learned, self.num_ranks),
        ):
            gradient = gradient_bytes(self.recipe)
            weights = self.element if parallel.distributed_optimizer else gradient
            found.append((learned * (gradient + weights) * (ranks - 1) / ranks, ranks))
        return found

    def _expert_replicas(self) -> int:
        """Ranks of a stage that hold the same experts."""
        parallel = self.recipe.parallel
        return self.num_ranks // (parallel.expert * parallel.pipeline)

    def _dispatch_bytes(self) -> Costs:
        """Bytes that a rank sends for one pass of a layer with experts: tokens to them, and their answers back."""
        language, ranks = self.recipe.model.language, self.recipe.parallel.expert
        share = len(expert_layers(language)) / language.num_layers * language.num_active_experts
        own = self.positions / self.recipe.parallel.tensor
        return 2 * share * own * language.hidden_size * self.element * (ranks - 1) / ranks

    def _between_stages(self) -> int:
        """Ranks from one stage to the next, which decide whether messages leave a node."""
        return self.recipe.parallel.tensor * self.recipe.parallel.context * 2

    def _link(self, ranks: int) -> float:
        """Bytes per second of a group: within a node if so many ranks fit in one."""
        inside = min(ranks, self.num_ranks) <= self.machine.gpus_per_node
        return self.machine.node_bandwidth if inside else self.machine.network_bandwidth
