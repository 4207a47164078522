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
from megatron_deepstack.config.sizes import expert_layers, head_width, recomputed_modules
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.planning.batch.targets import ROWS_MULTIPLE
from megatron_deepstack.planning.budget.encoder_memory import after_schedule, before_schedule, waiting
from megatron_deepstack.planning.budget.footprint import element_bytes, lasting_bytes
from megatron_deepstack.planning.budget.linears import expert_weights, linear_sizes
from megatron_deepstack.planning.budget.load import MicroBatchLoad, StepLoad
from megatron_deepstack.planning.budget.parameters import kept_widths, padded_vocabulary, stage_parameters
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


def rank_memory(recipe: Recipe, load: StepLoad, num_ranks: int, stage: int, *, fused: bool) -> RankMemory:
    """Estimate the memory of the ranks of one pipeline stage.

    Args:
        recipe: The recipe, whose layout has been checked.
        load: The replica's micro-batches.
        num_ranks: Number of ranks of the run, over which a distributed optimizer splits its states.
        stage: Number of the stage.
        fused: Whether layers are Transformer Engine's, which keep fewer intermediate values.

    Returns:
        The bytes of each kind.
    """
    model, element = recipe.model, element_bytes(recipe.train.precision)
    lasting = lasting_bytes(recipe, num_ranks, stage)
    chunks = [one for one in stage_chunks(model.language.num_layers, recipe.parallel) if one.pp == stage]
    activations, logits = _activations(recipe, load, chunks, fused)
    rows = _rows(recipe, load, chunks, element)
    learned = stage_parameters(recipe, stage).learned > 0 and not recipe.lora.rank
    in_schedule = _transient(recipe, load.micro_batches[0], chunks, learned, element)
    outside = max(before_schedule(recipe, load, element, rows), after_schedule(recipe, load, element))
    return RankMemory(
        weights=lasting.weights,
        gradients=lasting.gradients,
        optimizer=lasting.optimizer,
        activations=activations,
        logits=logits,
        rows=rows,
        encoder=waiting(recipe, load, stage, element),
        transient=max(in_schedule, outside - activations - logits),
    )


def _activations(recipe: Recipe, load: StepLoad, chunks: Sequence[Chunk], fused: bool) -> tuple[int, int]:
    """Return bytes of activations and of logits at the fullest moment of the schedule."""
    parallel, batches = recipe.parallel, load.micro_batches
    fullest, logits_then = 0, 0
    sums: dict[int, list[tuple[int, int]]] = {}
    for chunk in chunks:  # running sums over the first micro-batches
        found, most = [(0, 0)], _most_held(parallel, len(batches), chunk)
        for batch in batches[:most]:
            kept, head = chunk_activations(recipe, batch, chunk, fused=fused, packed=load.packed)
            found.append((found[-1][0] + kept, found[-1][1] + head))
        sums[chunk.vpp] = found
    for held in most_in_flight(parallel, len(batches), chunks[0].pp):
        total = sum(sums[chunk.vpp][held.get(chunk.vpp, 0)][0] for chunk in chunks)
        logits = sum(sums[chunk.vpp][held.get(chunk.vpp, 0)][1] for chunk in chunks)
        if total + logits > fullest:
            fullest, logits_then = total + logits, logits
    extra = 0
    if parallel.recompute is Recompute.FULL and batches:
        uniform = parallel.recompute_method is RecomputeMethod.UNIFORM
        group = parallel.recompute_num_layers if uniform else 1
        layers = max((chunk.stop - chunk.first for chunk in chunks), default=0)
        if uniform or group >= layers:  # else the layers that are kept are free again when others are recomputed
            extra = min(group, layers) * layer_activations(recipe, batches[0], fused=fused, packed=load.packed)
    if parallel.offload_layers and batches:
        whole = layer_activations(recipe, batches[0], fused=fused, packed=load.packed)
        extra = _in_transit(parallel, chunks, whole)
    return fullest - logits_then + extra, logits_then


def _most_held(parallel: ParallelConfig, num_micro_batches: int, chunk: Chunk) -> int:
    moments = most_in_flight(parallel, num_micro_batches, chunk.pp)
    return max((held.get(chunk.vpp, 0) for held in moments), default=0)


def chunk_activations(
    recipe: Recipe, batch: MicroBatchLoad, chunk: Chunk, *, fused: bool, packed: bool
) -> tuple[int, int]:
    """Return what one micro-batch leaves in a chunk for its backward pass.

    Args:
        recipe: The recipe.
        batch: The micro-batch.
        chunk: The chunk.
        fused: Whether layers are Transformer Engine's.
        packed: Whether the micro-batch is a pack.

    Returns:
        Bytes of activations, and bytes of logits.
    """
    parallel, element = recipe.parallel, element_bytes(recipe.train.precision)
    layers = chunk.stop - chunk.first
    whole = layer_activations(recipe, batch, fused=fused, packed=packed)
    split = _split_positions(parallel, batch)
    checkpoint = int(split * recipe.model.language.hidden_size * element)
    kept = layers * whole
    if parallel.recompute is Recompute.FULL:
        if parallel.recompute_method is RecomputeMethod.UNIFORM:
            kept = -(-layers // parallel.recompute_num_layers) * checkpoint
        else:
            again = min(parallel.recompute_num_layers, layers)
            kept = again * checkpoint + (layers - again) * whole
    kept -= _offloaded(recipe, batch, chunk, whole)
    if not chunk.has_head:
        return kept, 0
    rows = head_rows(parallel, batch)
    kept += int((2 * split + rows) * recipe.model.language.hidden_size * element)
    vocabulary = padded_vocabulary(recipe.model.language.vocab_size, parallel.tensor) // parallel.tensor
    return kept, int(rows * vocabulary * 4)


def head_rows(parallel: ParallelConfig, batch: MicroBatchLoad) -> float:
    """Return for how many positions of a micro-batch a rank computes logits.

    Args:
        parallel: The layout.
        batch: The micro-batch.

    Returns:
        Those of its targets, rounded up as `planning.batch.targets` does, or all that it holds.
    """
    pieces = parallel.tensor if parallel.sequence_parallel else 1
    each = max(-(-batch.targets // (parallel.context * pieces)), 1)
    rows = -(-each // ROWS_MULTIPLE) * ROWS_MULTIPLE * pieces
    return min(rows, batch.positions / parallel.context)


def _split_positions(parallel: ParallelConfig, batch: MicroBatchLoad) -> float:
    """Return the positions that a rank has between the tensor-parallel regions."""
    return batch.positions / parallel.context / (parallel.tensor if parallel.sequence_parallel else 1)


def layer_activations(recipe: Recipe, batch: MicroBatchLoad, *, fused: bool, packed: bool) -> int:
    """Return the bytes that one decoder layer keeps of one micro-batch, without recomputation of whole layers.

    Args:
        recipe: The recipe.
        batch: The micro-batch.
        fused: Whether layers are Transformer Engine's.
        packed: Whether the micro-batch is a pack.

    Returns:
        Bytes on one rank.
    """
    parallel, model = recipe.parallel, recipe.model
    language, element = model.language, element_bytes(recipe.train.precision)
    w, k, f = kept_widths(model, parallel.tensor)
    of_mlp = kept_of_gated_mlp(model.language, fused=fused)
    heads = language.num_heads // parallel.tensor
    split, inner = _split_positions(parallel, batch), batch.positions / parallel.context
    h, lora = language.hidden_size, recipe.lora
    learns = Part.LANGUAGE in recipe.train.trainable
    whole, adapted = learns and not lora.rank, learns and lora.rank > 0
    needed: Collection[LoraTarget] = (tuple(LoraTarget) if whole else lora.targets) if learns else ()
    rotary = 4 * head_width(language) * inner / batch.size * 4
    scalars = (2 * split + heads * inner) * 4
    into_norms = (LoraTarget.QKV in needed) + (
        LoraTarget.MLP_IN in needed
    )  # a linear without a gradient needs no input
    copied = not fused and (packed or batch.size > 1 or parallel.context > 1) and LoraTarget.ATTENTION_OUTPUT in needed
    into_mlp = (of_mlp - 1) + (LoraTarget.MLP_OUT in needed)
    values = split * (2 + into_norms) * h + inner * ((w + 2 * k) + w + k + (1 + copied) * w + into_mlp * f)
    values += inner * lora.rank * len(needed) * adapted
    if fused:
        rotary = 0.0
    else:
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
    return int(values * element + rotary + scalars)


def _offloaded(recipe: Recipe, batch: MicroBatchLoad, chunk: Chunk, whole: int) -> int:
    """Return how many bytes less a micro-batch leaves in a chunk whose first layers' activations are on the host."""
    parallel = recipe.parallel
    split, inner = _split_positions(parallel, batch), batch.positions / parallel.context
    heads = recipe.model.language.num_heads // parallel.tensor
    again = recomputed_modules(parallel)
    small = [0.0 if RecomputeModule.LAYER_NORM in again else split * 4] * 2
    small.append(0.0 if RecomputeModule.CORE_ATTENTION in again else heads * inner * 4)
    stays = sum(size for size in small if size <= parallel.offload_above_mib * 2**20)
    moved = min(parallel.offload_layers, chunk.stop - chunk.first)
    received = split * recipe.model.language.hidden_size * element_bytes(recipe.train.precision)
    return int(moved * (whole - stays) - bool(moved and not chunk.has_embedding) * received)


def _in_transit(parallel: ParallelConfig, chunks: Sequence[Chunk], whole: int) -> int:
    """Return the bytes of layers that are leaving for the host, or have come back early, beside those that stay.

    A layer leaves while the next one runs, and is back when the backward pass of that next one begins. By then layers
    above both that stay have given their memory free.
    """
    layers = max((chunk.stop - chunk.first for chunk in chunks), default=0)
    moved = min(parallel.offload_layers, layers)
    return min(moved, max(2 - (layers - moved), 0)) * whole


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


def _transient(recipe: Recipe, batch: MicroBatchLoad, chunks: Sequence[Chunk], learned: bool, element: int) -> int:
    """Return the bytes of the largest tensors that exist only within one operator's backward pass."""
    parallel, language = recipe.parallel, recipe.model.language
    inner = batch.positions / parallel.context
    _, _, f = kept_widths(recipe.model, parallel.tensor)
    widest = max(inputs * outputs for inputs, outputs in linear_sizes(language).values()) // parallel.tensor
    if expert_layers(language):  # of all experts of a rank together, in their input
        widest = max(widest, language.num_experts // parallel.expert * expert_weights(language) * 2 // 3)
    layer = inner * (4 * f + 2 * language.hidden_size) * element + widest * element * learned
    head = 0.0
    if any(chunk.has_head for chunk in chunks):
        vocabulary = padded_vocabulary(language.vocab_size, parallel.tensor) // parallel.tensor
        copy = 4 if recipe.train.precision is Precision.FP32 else 6
        head = head_rows(parallel, batch) * vocabulary * copy + vocabulary * language.hidden_size * element * learned
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
