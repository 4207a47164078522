"""The memory of a rank, by kind: weights, gradients, optimizer states, activations, logits, rows, encoder.

Activations are what the backward pass needs of the forward pass, operator by operator, for the micro-batches that the
schedule holds at the same time. On top comes what exists only for a moment: the gradients of the widest layer or of
the logits. Formulas count elements per position; a test compares the sums with what ranks allocate.

Not modelled: communication buffers and workspaces of libraries, fragmentation (`Machine.reserved_bytes` stands for all
of these), FP8 copies of weights, and CUDA graphs.

Legend: h hidden, f MLP, w queries, k keys, d head, a heads, V vocabulary, all as one tensor-parallel rank has them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_deepstack.config.choices import (
    Activation,
    EncoderPlacement,
    Layers,
    LoraTarget,
    Part,
    Precision,
    Recompute,
    RecomputeMethod,
    RecomputeModule,
)
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, Recipe
from megatron_deepstack.config.sizes import expert_layers, head_width, padded_vocabulary, recomputed_modules
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.planning.batch.targets import ROWS_MULTIPLE
from megatron_deepstack.planning.budget.encoder_memory import after_schedule, before_schedule, waiting
from megatron_deepstack.planning.budget.footprint import element_bytes, lasting_bytes_of
from megatron_deepstack.planning.budget.linears import expert_weights, linear_sizes
from megatron_deepstack.planning.budget.load import Costs, MicroBatches, Numbers, StepLoad
from megatron_deepstack.planning.budget.parameters import kept_widths, parameters_of_stages
from megatron_deepstack.planning.budget.pipeline import most_in_flight
from megatron_deepstack.planning.budget.received_rows import FETCHED_AHEAD, rest_on_host
from megatron_deepstack.planning.slots import Chunk, decoder_slots, stage_chunks


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of the decoder, over all micro-batches that are in flight."""
    logits: int
    rows: int
    """Received rows of all micro-batches, whose gradients take their place; or of a few, if they rest on the host."""
    encoder: int
    """Activations of tower and projector that wait for their backward."""
    transient: int
    """Largest tensors that exist only for a moment."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, one.name) for one in fields(self))


def stage_memories(
    recipe: Recipe, load: StepLoad, num_ranks: int, *, fused: bool, device_bytes: int | None = None
) -> tuple[RankMemory, ...]:
    """Estimate the memory of the ranks of each pipeline stage.

    Args:
        recipe: The recipe, whose layout has been checked.
        load: The replica's micro-batches.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.
        fused: Whether layers are Transformer Engine's, which keep fewer intermediate values.
        device_bytes: Memory of a rank's device, of which too many rows take no more than a share; None if not known.

    Returns:
        The bytes of each kind, stage by stage.
    """
    chunks = stage_chunks(recipe.model.language.num_layers, recipe.parallel)
    kept, element = _Kept(recipe, load, fused), element_bytes(recipe.train.precision)
    held, after = parameters_of_stages(recipe), after_schedule(recipe, load, element)
    found = []
    for stage, lasting in enumerate(lasting_bytes_of(recipe, num_ranks, held)):
        mine = [one for one in chunks if one.pp == stage]
        activations, logits = kept.of_stage(mine)
        received = _received(recipe, load, mine, element)
        on_host = rest_on_host(recipe.parallel.rows_on_host, received, device_bytes)
        rows = min(_fetched(recipe, load, mine, element), received) if on_host else received
        learned = held[stage].learned > 0 and not recipe.lora.rank
        in_schedule = _transient(recipe, load.micro_batches, mine, learned, element, kept.of_head(mine))
        sending = before_schedule(recipe, load, element, received, 0 if on_host else received)
        outside = max(sending - rows, after)
        found.append(
            RankMemory(
                weights=lasting.weights,
                gradients=lasting.gradients,
                optimizer=lasting.optimizer,
                activations=activations,
                logits=logits,
                rows=rows,
                encoder=waiting(recipe, load, stage, element),
                transient=max(in_schedule, outside - activations - logits),
            )
        )
    return tuple(found)


class _Kept:
    """What micro-batches leave in chunks for their backward passes; arrays have one entry per micro-batch, (M,)."""

    def __init__(self, recipe: Recipe, load: StepLoad, fused: bool) -> None:
        self.parallel, self.count = recipe.parallel, len(load.micro_batches)
        parallel, language = recipe.parallel, recipe.model.language
        batches = load.micro_batches
        hidden = language.hidden_size * element_bytes(recipe.train.precision)
        split, rows = _split_positions(parallel, batches), head_rows(parallel, batches)
        vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        self.layer = layer_activations(recipe, batches, fused=fused, packed=load.packed)
        self.small = _small_activations(recipe, batches)
        self.checkpoint = (split * hidden).astype(np.int64)
        self.head = ((2 * split + rows) * hidden).astype(np.int64)
        self.logits = (rows * vocabulary * 4).astype(np.int64)
        self._most: dict[tuple[int, bool, bool, int], int] = {}

    def of_stage(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """Return bytes of activations and of logits at the fullest moment of the schedule."""
        parallel, fullest, logits_then = self.parallel, 0, 0
        for held in most_in_flight(parallel.pipeline, parallel.virtual_pipeline, self.count, chunks[0].pp):
            pairs = list(zip(chunks, held, strict=True))
            total = sum(self._most_of_chunk(chunk, number) for chunk, number in pairs)
            logits = sum(_most_neighbours(self.logits, number) for chunk, number in pairs if chunk.has_head)
            if total + logits > fullest:
                fullest, logits_then = total + logits, logits
        extra = 0
        if parallel.recompute is Recompute.FULL:
            uniform = parallel.recompute_method is RecomputeMethod.UNIFORM
            group = parallel.recompute_num_layers if uniform else 1
            layers = max((chunk.stop - chunk.first for chunk in chunks), default=0)
            if uniform or group >= layers:  # else the layers that are kept are free again when others are recomputed
                extra = min(group, layers) * int(self.layer.max())
                extra = max(extra - self.of_head(chunks), 0)
        if parallel.offload_layers:
            extra = self._in_transit(chunks)
        return fullest - logits_then + extra, logits_then

    def of_head(self, chunks: Sequence[Chunk]) -> int:
        """Return the bytes that the head keeps, which are free again before the first backward pass of a layer."""
        return int((self.head + self.logits).max()) if any(chunk.has_head for chunk in chunks) else 0

    def _in_transit(self, chunks: Sequence[Chunk]) -> int:
        """Return the bytes of layers that are leaving for the host, or are back early, beside those that stay.

        A layer leaves while the next one runs, and is back when the backward pass of that next one begins. By then
        layers above both that stay have given their memory free.
        """
        layers = max((chunk.stop - chunk.first for chunk in chunks), default=0)
        moved = min(self.parallel.offload_layers, layers)
        return min(moved, max(2 - (layers - moved), 0)) * int(self.layer.max())

    def _most_of_chunk(self, chunk: Chunk, number: int) -> int:
        """Most bytes of activations that so many neighbouring micro-batches leave in a chunk."""
        key = chunk.stop - chunk.first, chunk.has_embedding, chunk.has_head, number
        if key not in self._most:
            self._most[key] = _most_neighbours(self._of_chunk(chunk), number)
        return self._most[key]

    def _of_chunk(self, chunk: Chunk) -> Numbers:
        """Bytes of activations that each micro-batch leaves in a chunk."""
        parallel, layers = self.parallel, chunk.stop - chunk.first
        kept: Numbers = layers * self.layer
        if parallel.recompute is Recompute.FULL:
            if parallel.recompute_method is RecomputeMethod.UNIFORM:
                kept = -(-layers // parallel.recompute_num_layers) * self.checkpoint
            else:
                again = min(parallel.recompute_num_layers, layers)
                kept = again * self.checkpoint + (layers - again) * self.layer
        if parallel.offload_layers and layers:
            moved = min(parallel.offload_layers, layers)
            received = self.checkpoint * (not chunk.has_embedding)  # a stage's input stays
            kept = kept - moved * (self.layer - self.small) + received
        return kept + self.head if chunk.has_head else kept


def _most_neighbours(values: Numbers, number: int) -> int:
    """Return the largest sum over so many neighbouring micro-batches."""
    if number <= 1:
        return int(values.max()) * number
    sums = np.concatenate([[0], np.cumsum(values)])
    number = min(number, len(values))
    return int((sums[number:] - sums[: len(sums) - number]).max())


def head_rows(parallel: ParallelConfig, batches: MicroBatches) -> Costs:
    """Return for how many positions of each micro-batch a rank computes logits.

    Args:
        parallel: The layout.
        batches: The micro-batches.

    Returns:
        float64 (M,), those of its targets, rounded up as `planning.batch.targets` does, or all that it holds.
    """
    pieces = parallel.tensor if parallel.sequence_parallel else 1
    each = np.maximum(-(-batches.targets // (parallel.context * pieces)), 1)
    rows = -(-each // ROWS_MULTIPLE) * ROWS_MULTIPLE * pieces
    return np.minimum(rows, batches.positions / parallel.context)


def _split_positions(parallel: ParallelConfig, batches: MicroBatches) -> Costs:
    """Return the positions that a rank has of each micro-batch between the tensor-parallel regions."""
    return batches.positions / parallel.context / (parallel.tensor if parallel.sequence_parallel else 1)


def layer_activations(recipe: Recipe, batches: MicroBatches, *, fused: bool, packed: bool) -> Numbers:
    """Return the bytes that one decoder layer keeps of each micro-batch, without recomputation of whole layers.

    Args:
        recipe: The recipe.
        batches: The micro-batches.
        fused: Whether layers are Transformer Engine's.
        packed: Whether micro-batches are packs.

    Returns:
        int64 (M,), bytes on one rank.
    """
    parallel, model = recipe.parallel, recipe.model
    language, element = model.language, element_bytes(recipe.train.precision)
    w, k, f = kept_widths(model, parallel.tensor)
    of_mlp = kept_of_gated_mlp(model.language, fused=fused)
    heads = language.num_heads // parallel.tensor
    split, inner = _split_positions(parallel, batches), batches.positions / parallel.context
    h, lora = language.hidden_size, recipe.lora
    learns = Part.LANGUAGE in recipe.train.trainable
    whole, adapted = learns and not lora.rank, learns and lora.rank > 0
    needed: Collection[LoraTarget] = (tuple(LoraTarget) if whole else lora.targets) if learns else ()
    rotary = 4 * head_width(language) * inner / batches.size * 4
    scalars = (2 * split + heads * inner) * 4
    into_norms = (LoraTarget.QKV in needed) + (
        LoraTarget.MLP_IN in needed
    )  # a linear without a gradient needs no input
    several = packed or batches.size > 1 or parallel.context > 1
    copied = not fused and several and LoraTarget.ATTENTION_OUTPUT in needed
    into_mlp = (of_mlp - 1) + (LoraTarget.MLP_OUT in needed)
    values = split * (2 + into_norms) * h + inner * ((w + 2 * k) + w + k + (1 + copied) * w + into_mlp * f)
    values += inner * lora.rank * len(needed) * adapted
    if not fused:
        values += split * 2 * h * whole  # normalised values, for the gradients of the norms' weights
        if language.qk_norm:
            values += inner * (2 * w + k if whole else w)
    with_experts = len(expert_layers(language)) / language.num_layers
    values += 2 * split * h * language.num_active_experts * with_experts  # sent to experts, and what they answer
    again = recomputed_modules(parallel)
    if RecomputeModule.CORE_ATTENTION in again:
        values -= inner * copied * w
        scalars -= heads * inner * 4
    if RecomputeModule.MLP in again:  # all but its input, which counts with the norm
        values -= inner * into_mlp * f
    if RecomputeModule.LAYER_NORM in again and learns:
        apart = 1.0 if not fused or lora.rank else with_experts / 2  # share of the norms that no linear computes
        values -= split * h * apart * (into_norms + (0 if fused else 2 * whole))
        scalars -= 2 * split * apart * 4
    if RecomputeModule.EXPERT_ACTIVATION in again and RecomputeModule.MLP not in again and learns:
        active = language.num_active_experts * language.expert_ffn_hidden_size // parallel.tensor
        values -= inner * active * with_experts
    return (values * element + rotary * (not fused) + scalars).astype(np.int64)


def _small_activations(recipe: Recipe, batches: MicroBatches) -> Numbers:
    """Return the bytes of a layer's activations that are too small to be moved to the host: int64 (M,)."""
    parallel = recipe.parallel
    again, most = recomputed_modules(parallel), parallel.offload_above_mib * 2**20
    of_norm = _split_positions(parallel, batches) * 4
    of_attention = recipe.model.language.num_heads // parallel.tensor * batches.positions / parallel.context * 4
    norms = 2 * of_norm * (of_norm <= most) * (RecomputeModule.LAYER_NORM not in again)
    attention = of_attention * (of_attention <= most) * (RecomputeModule.CORE_ATTENTION not in again)
    return (norms + attention).astype(np.int64)


def kept_of_gated_mlp(language: LanguageConfig, *, fused: bool) -> int:
    """Return how many of its widths a gated MLP keeps of each token: its input's two halves, and what it makes of them.

    Args:
        language: The decoder.
        fused: Whether layers are Transformer Engine's.

    Returns:
        3 where the activation is one operator, 5 where the parts of it are kept as well, as in experts on a CPU.
    """
    one_operator = family_of(language).activation is Activation.SILU and not expert_layers(language)
    return 3 if fused or one_operator else 5


def _received(recipe: Recipe, load: StepLoad, chunks: Sequence[Chunk], element: int) -> int:
    """Return the bytes of the rows that the stage's ranks add in all micro-batches of the step.

    Rows that the stage makes itself exist for one micro-batch at a time.
    """
    inline = recipe.parallel.encoder_placement is EncoderPlacement.INLINE
    visual = int(load.micro_batches.visual.max() if inline else load.micro_batches.visual.sum())
    return int(sum(_row_numbers(recipe, chunk) for chunk in chunks) * visual * element)


def _row_numbers(recipe: Recipe, chunk: Chunk) -> float:
    """Return how many numbers of rows a chunk adds on one rank for each visual token.

    Each of its stacks has a row there, which is zeros where the image has no such stack; several may share a slot.
    """
    parallel, model = recipe.parallel, recipe.model
    rows = sum(chunk.owns(slot) for slot in decoder_slots(model))
    rows += chunk.has_embedding and model.variant.traits.has_base_rows
    return rows / parallel.context / (parallel.tensor if parallel.sequence_parallel else 1) * model.language.hidden_size


def _fetched(recipe: Recipe, load: StepLoad, chunks: Sequence[Chunk], element: int) -> int:
    """Return the most bytes of rows that are on the device where they rest on the host.

    These are the rows of the micro-batches in flight, those brought ahead, and the gradients of one micro-batch.
    """
    parallel, count = recipe.parallel, len(load.micro_batches)
    visual = load.micro_batches.visual
    each = [_row_numbers(recipe, chunk) for chunk in chunks]
    most = max(
        sum(rows * _most_neighbours(visual, number) for rows, number in zip(each, held, strict=True))
        for held in most_in_flight(parallel.pipeline, parallel.virtual_pipeline, count, chunks[0].pp)
    )
    return int((most + max(each) * (FETCHED_AHEAD + 1) * _most_neighbours(visual, 1)) * element)


def _transient(
    recipe: Recipe, batches: MicroBatches, chunks: Sequence[Chunk], learned: bool, element: int, of_head: int
) -> int:
    """Return the bytes of the largest tensors that exist only within one operator's backward pass.

    Those of a layer count beyond what the head has kept until then.
    """
    parallel, language = recipe.parallel, recipe.model.language
    inner = int(batches.positions.max()) / parallel.context
    _, _, f = kept_widths(recipe.model, parallel.tensor)
    widest = max(inputs * outputs for inputs, outputs in linear_sizes(language).values()) // parallel.tensor
    if expert_layers(language):  # of all experts of a rank together, in their input
        widest = max(widest, language.num_experts // parallel.expert * expert_weights(language) * 2 // 3)
    layer = inner * (4 * f + 2 * language.hidden_size) * element + widest * element * learned
    head = 0.0
    if any(chunk.has_head for chunk in chunks):
        vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        copy = 4 if recipe.train.precision is Precision.FP32 else 6
        head = (
            float(head_rows(parallel, batches).max()) * vocabulary * copy
            + vocabulary * language.hidden_size * element * learned
        )
    return int(max(layer - of_head, head))


def uses_fused_layers(recipe: Recipe, on_gpu: bool) -> bool:
    """Whether layers are Transformer Engine's on a kind of machine, as far as can be told without it.

    Args:
        recipe: The recipe.
        on_gpu: Whether the machine has GPUs.

    Returns:
        True if they are.
    """
    return on_gpu and recipe.model.layers is not Layers.LOCAL
