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
from megatron_deepstack.config.sizes import expert_layers, head_width, padded_vocabulary
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.planning.batch.targets import ROWS_MULTIPLE
from megatron_deepstack.planning.budget.encoder_memory import after_schedule, before_schedule, waiting
from megatron_deepstack.planning.budget.footprint import element_bytes, lasting_bytes_of
from megatron_deepstack.planning.budget.linears import expert_weights, linear_sizes
from megatron_deepstack.planning.budget.load import Costs, MicroBatches, Numbers, StepLoad
from megatron_deepstack.planning.budget.parameters import kept_widths, parameters_of_stages
from megatron_deepstack.planning.budget.pipeline import most_in_flight
from megatron_deepstack.planning.slots import EMBEDDING, Chunk, chunk_slots, decoder_slots, stage_chunks


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
    """Received rows of all micro-batches, whose gradients take their place."""
    encoder: int
    """Activations of tower and projector that wait for their backward."""
    transient: int
    """Largest tensors that exist only for a moment."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, one.name) for one in fields(self))


def stage_memories(recipe: Recipe, load: StepLoad, num_ranks: int, *, fused: bool) -> tuple[RankMemory, ...]:
    """Estimate the memory of the ranks of each pipeline stage.

    Args:
        recipe: The recipe, whose layout has been checked.
        load: The replica's micro-batches.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.
        fused: Whether layers are Transformer Engine's, which keep fewer intermediate values.

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
        rows = _rows(recipe, load, mine, element)
        learned = held[stage].learned > 0 and not recipe.lora.rank
        in_schedule = _transient(recipe, load.micro_batches, mine, learned, element)
        outside = max(before_schedule(recipe, load, element, rows), after)
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
        batches = load.micro_batches.first(_most_held(parallel, self.count))
        hidden = language.hidden_size * element_bytes(recipe.train.precision)
        split, rows = _split_positions(parallel, batches), head_rows(parallel, batches)
        vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        self.layer = layer_activations(recipe, batches, fused=fused, packed=load.packed)
        self.checkpoint = (split * hidden).astype(np.int64)
        self.head = ((2 * split + rows) * hidden).astype(np.int64)
        self.logits = (rows * vocabulary * 4).astype(np.int64)

    def of_stage(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """Return bytes of activations and of logits at the fullest moment of the schedule."""
        parallel, fullest, logits_then = self.parallel, 0, 0
        kept = [_running(self._of_chunk(chunk)) for chunk in chunks]
        heads = [_running(self.logits * chunk.has_head) for chunk in chunks]
        for held in most_in_flight(parallel.pipeline, parallel.virtual_pipeline, self.count, chunks[0].pp):
            total = sum(sums[number] for sums, number in zip(kept, held, strict=True))
            logits = sum(sums[number] for sums, number in zip(heads, held, strict=True))
            if total + logits > fullest:
                fullest, logits_then = total + logits, logits
        extra = 0
        if parallel.recompute is Recompute.FULL:
            uniform = parallel.recompute_method is RecomputeMethod.UNIFORM
            group = parallel.recompute_num_layers if uniform else 1
            layers = max((chunk.stop - chunk.first for chunk in chunks), default=0)
            if uniform or group >= layers:  # else the layers that are kept are free again when others are recomputed
                extra = min(group, layers) * int(self.layer[0])
        return fullest - logits_then + extra, logits_then

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
        return kept + self.head if chunk.has_head else kept


def _running(values: Numbers) -> list[int]:
    """Return the sums of the first values: of none, of one, and so on."""
    return [0, *np.cumsum(values).tolist()]


def _most_held(parallel: ParallelConfig, num_micro_batches: int) -> int:
    """Return the largest number of micro-batches that any stage holds for a chunk; the first stage holds most."""
    moments = most_in_flight(parallel.pipeline, parallel.virtual_pipeline, num_micro_batches, 0)
    return max(map(max, moments))


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
    if parallel.recompute is Recompute.SELECTIVE:
        if RecomputeModule.CORE_ATTENTION in parallel.recompute_modules:
            values -= inner * copied * w
            scalars -= heads * inner * 4
        if RecomputeModule.MLP in parallel.recompute_modules:  # all but its input, which counts with the norm
            values -= inner * into_mlp * f
    return (values * element + rotary * (not fused) + scalars).astype(np.int64)


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


def _rows(recipe: Recipe, load: StepLoad, chunks: Sequence[Chunk], element: int) -> int:
    """Return the bytes of the rows that the stage's ranks add in all micro-batches of the step."""
    parallel, model = recipe.parallel, recipe.model
    if parallel.encoder_placement is EncoderPlacement.INLINE:
        return 0
    slots = decoder_slots(model)
    mine = {slot for chunk in chunks for slot in chunk_slots(chunk, slots)}
    mine |= {EMBEDDING} if any(chunk.has_embedding for chunk in chunks) else set()
    split = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    rows = sum(per_unit * load.units for slot, per_unit in load.rows_per_unit.items() if slot in mine) / split
    return int(rows * model.language.hidden_size * element)


def _transient(recipe: Recipe, batches: MicroBatches, chunks: Sequence[Chunk], learned: bool, element: int) -> int:
    """Return the bytes of the largest tensors that exist only within one operator's backward pass."""
    parallel, language = recipe.parallel, recipe.model.language
    first = batches.first(1)
    inner = int(first.positions[0]) / parallel.context
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
            float(head_rows(parallel, first)[0]) * vocabulary * copy
            + vocabulary * language.hidden_size * element * learned
        )
    return int(max(layer, head))


def uses_fused_layers(recipe: Recipe, on_gpu: bool) -> bool:
    """Whether layers are Transformer Engine's on a kind of machine, as far as can be told without it.

    Args:
        recipe: The recipe.
        on_gpu: Whether the machine has GPUs.

    Returns:
        True if they are.
    """
    return on_gpu and recipe.model.layers is not Layers.LOCAL
