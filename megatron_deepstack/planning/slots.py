"""Which chunk of the pipeline owns which decoder layer, and therefore which stack.

A *slot* is the 0-based global decoder layer to whose input a stack is added. The base visual tokens have the slot
`EMBEDDING`: they replace the placeholders in the output of the word embedding. Everything here is pure arithmetic that
every rank repeats with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, StackConfig
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.errors import LayoutError, SlotError
from megatron_deepstack.planning.views import HIGH_RES_SIDE

EMBEDDING = -1
"""Slot of the base visual tokens."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of the decoder that one rank holds under one virtual stage."""

    pp: int
    """Pipeline stage."""
    vpp: int
    """Virtual stage within it; 0 without interleaving."""
    first: int
    """First decoder layer."""
    stop: int
    """One past the last decoder layer; equal to `first` if the chunk holds none."""
    has_embedding: bool
    """Whether the chunk has the word embedding, and with it the slot `EMBEDDING`."""
    has_head: bool
    """Whether the chunk has the final norm, the output layer and the loss."""

    def owns(self, slot: int) -> bool:
        """Whether rows of this slot are added in this chunk; those of the slot after the last layer with the head."""
        if slot == EMBEDDING:
            return self.has_embedding
        return self.first <= slot < self.stop or (self.has_head and slot == self.stop)


def stack_slots(
    stacks: StackConfig, num_layers: int, *, num_stacks: int | None = None, after_last: bool = False
) -> tuple[int, ...]:
    """Return the layer of each stack, in stack order (paper, algorithm 1; the published default is 1, 2, 3, 4).

    Args:
        stacks: The section `model.stacks` of the recipe.
        num_layers: Number of layers of the decoder.
        num_stacks: Number of stacks; None means `stacks.num_crops`, one for each crop.
        after_last: Whether a stack may also be added to the output of the last layer, whose slot is `num_layers`.

    Returns:
        0-based global layers, one for each stack.

    Raises:
        SlotError: A slot is outside the decoder, or `stacks.slots` has another length. No stack is left out silently.
    """
    wanted = stacks.num_crops if num_stacks is None else num_stacks
    slots = stacks.slots
    if slots is None:
        slots = tuple(stacks.start + k * stacks.interval for k in range(wanted))
    problems = []
    if len(slots) != wanted:
        problems.append(
            f"model.stacks.slots: {len(slots)} slots {list(slots)} for {wanted} stacks; give one layer per stack "
            f"({wanted}), or change model.stacks.num_crops or num_stacks"
        )
    for stack, slot in enumerate(slots):
        if not 0 <= slot < num_layers + after_last:
            problems.append(
                f"model.stacks: stack {stack} has slot {slot}, outside the model of {num_layers} layers "
                f"(0 to {num_layers - 1}); lower model.stacks.start or interval, or name layers in model.stacks.slots"
            )
    if problems:
        raise SlotError(problems)
    return slots


def decoder_slots(model: ModelConfig) -> tuple[int, ...]:
    """Return the slots of the decoder's stacks; empty for variants that add no stacks in the decoder.

    Raises:
        SlotError: A stack has no layer, see `stack_slots`.
    """
    if not model.variant.traits.stacks_in_decoder:
        return ()
    after_last = model.variant.traits.is_native  # published so: stack k is added to the output of layer k
    number = num_decoder_stacks(model)
    return stack_slots(model.stacks, model.language.num_layers, num_stacks=number, after_last=after_last)


def num_decoder_stacks(model: ModelConfig) -> int:
    """Return the number of stacks in the decoder: `model.stacks.num_stacks`, or else all that an image can have."""
    if not model.variant.traits.stacks_in_decoder:
        return 0
    return model.stacks.num_stacks or most_decoder_stacks(model)


def most_decoder_stacks(model: ModelConfig) -> int:
    """Return the number of stacks of an image: one for each crop, high-res crop of a context view, or tap."""
    match model.variant.traits.stack_source:
        case StackSource.HIGH_RES:
            return HIGH_RES_SIDE**2
        case StackSource.TAPS:
            return len(model.vision.taps)
        case _:
            return model.stacks.num_crops


def layers_per_chunk(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the number of decoder layers of each chunk: equal numbers, unless the recipe sets `layers_per_stage`.

    Args:
        num_layers: Number of layers of the decoder.
        parallel: The layout.

    Returns:
        The numbers in model order: chunk `v * pipeline + p` is virtual stage v of stage p.

    Raises:
        LayoutError: The layers do not split evenly, or the numbers in the recipe do not fit.
    """
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.layers_per_stage is not None:
        given = parallel.layers_per_stage
        if len(given) != num_chunks or sum(given) != num_layers or min(given, default=0) < 0:
            raise LayoutError(
                [
                    f"parallel.layers_per_stage: {list(given)} must be {num_chunks} counts (pipeline "
                    f"{parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline}) that sum to the decoder's "
                    f"{num_layers} layers; they are {len(given)} and sum to {sum(given)}"
                ]
            )
        return given
    if num_layers % num_chunks:
        raise LayoutError(
            [
                f"parallel: {num_layers} decoder layers do not split evenly over {num_chunks} chunks (pipeline "
                f"{parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline}); choose a divisor of "
                f"{num_layers}, or name the counts in parallel.layers_per_stage, for example "
                f"{nearly_even(num_layers, num_chunks)}"
            ]
        )
    return (num_layers // num_chunks,) * num_chunks


def nearly_even(num_layers: int, num_chunks: int) -> list[int]:
    """Divide layers into counts that differ by at most one, with the larger counts in the last chunks.

    Args:
        num_layers: Number of layers.
        num_chunks: Number of counts, at most `num_layers`.

    Returns:
        The counts, in model order.
    """
    small, rest = divmod(num_layers, num_chunks)
    return [small + (index >= num_chunks - rest) for index in range(num_chunks)]


def stage_chunks(num_layers: int, parallel: ParallelConfig) -> tuple[Chunk, ...]:
    """Divide the decoder into chunks.

    Args:
        num_layers: Number of layers of the decoder.
        parallel: The layout.

    Returns:
        All chunks in model order: chunk `v * pipeline + p` is virtual stage v of stage p.

    Raises:
        LayoutError: The layers do not fit the layout, see `layers_per_chunk`.
    """
    return _chunks(layers_per_chunk(num_layers, parallel), parallel.pipeline)


@lru_cache(maxsize=1024)
def _chunks(counts: tuple[int, ...], pipeline: int) -> tuple[Chunk, ...]:
    chunks, first = [], 0
    for index, count in enumerate(counts):
        vpp, pp = divmod(index, pipeline)
        chunks.append(
            Chunk(
                pp=pp,
                vpp=vpp,
                first=first,
                stop=first + count,
                has_embedding=index == 0,
                has_head=index == len(counts) - 1,
            )
        )
        first += count
    return tuple(chunks)


def chunk_slots(chunk: Chunk, slots: Sequence[int]) -> tuple[int, ...]:
    """Select the decoder slots that are in a chunk.

    Args:
        chunk: The chunk.
        slots: Slots of all stacks; several stacks may have the same slot.

    Returns:
        The distinct slots in ascending order, without `EMBEDDING`.
    """
    return tuple(sorted({slot for slot in slots if slot != EMBEDDING and chunk.owns(slot)}))


def owner(slot: int, chunks: Sequence[Chunk]) -> int:
    """Find the chunk that adds the rows of a slot.

    Args:
        slot: A decoder layer, or `EMBEDDING`.
        chunks: All chunks of the model.

    Returns:
        The index of the chunk in `chunks`.

    Raises:
        SlotError: No chunk adds them.
    """
    for index, chunk in enumerate(chunks):
        if chunk.owns(slot):
            return index
    last = max(chunk.stop for chunk in chunks)
    raise SlotError([f"slot {slot} lies in no chunk of a model of {last} layers (0 to {last - 1})"])
