"""Two ways to the logits of the next token: with a key/value cache, and by computing the whole sequence again.

With the cache, the prompt is read once, in one or several pieces, and its stacks are added then; after that the stages
pass one token's hidden states. The recomputing way is the forward pass of training and the reference of the tests.

Legend: M micro-batches, B micro-batch, W tokens of a step, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from megatron_deepstack.config.sizes import sequence_multiple
from megatron_deepstack.model.language import NO_VISUAL_INPUTS, VisualInputs
from megatron_deepstack.model.layers.key_value_cache import CachedStep, KeyValueCache
from megatron_deepstack.parallel.context import gather_sequence
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.platform.compute.device import local_device
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.schedule import VisualOf, run_cached_step
from megatron_deepstack.step.train_step import VisualPass
from megatron_deepstack.step.visual import of_stretch

PREFILL_TOKENS: Final = 16384
"""Most tokens of a micro-batch that are read at once where sequences are not split over ranks; bounds activations."""


class Decoder(ABC):
    """The logits of the next token of all sequences. All methods are collective over the replica."""

    @abstractmethod
    def first(self) -> list[torch.Tensor]:
        """Read the prompts.

        Returns:
            On the last stage, for each micro-batch logits (B, V / tp) of the token after each prompt.
        """

    @abstractmethod
    def after(self, chosen: np.ndarray) -> list[torch.Tensor]:
        """Go on after one token.

        Args:
            chosen: int64 (M, B): the token that was chosen for each sequence.

        Returns:
            As `first`.
        """


class CachedDecoder(Decoder):
    """Reads each token once, and keeps its keys and values."""

    def __init__(
        self,
        engine: Engine,
        plan: StepPlan,
        visual: VisualPass,
        lengths: np.ndarray,
        max_new_tokens: int,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """Start at nothing read.

        Args:
            engine: The model.
            plan: The prompts' plan.
            visual: Their rows.
            lengths: Integers (M, B): tokens of each prompt.
            max_new_tokens: Most tokens that will follow a prompt.
            prefill_tokens: Most tokens of a micro-batch that are read at once. Prompts that ranks share by positions
                (context or sequence parallelism) are read whole.
        """
        self.engine, self.plan, self.visual, self.lengths = engine, plan, visual, lengths
        self.multiple = sequence_multiple(engine.parallel)
        if self.multiple > 1:
            self.piece = plan.seq_length
        else:
            self.piece = min(plan.seq_length, max(prefill_tokens // plan.micro_batch_size, 1))
        capacity = plan.seq_length + max_new_tokens + self.multiple
        self.caches = [KeyValueCache(plan.micro_batch_size, capacity) for _ in plan.tokens]
        self.ends = lengths.copy()
        """(M, B): tokens of each sequence that are in the cache, after the prompts have been read."""
        self.beyond = self._beyond_prompts()

    def first(self) -> list[torch.Tensor]:
        """As the base says; the newest logits win that a prompt's last token gave."""
        kept: list[torch.Tensor] = []
        for begin in range(0, self.plan.seq_length, self.piece):
            stop = min(begin + self.piece, self.plan.seq_length)
            last = np.clip(self.lengths - 1 - begin, 0, stop - begin - 1)
            logits = self._run(
                [tokens[:, begin:stop] for tokens in self.plan.tokens],
                np.full(self.lengths.shape, begin),
                last,
                self._rows(begin, stop),
                None if self.plan.positions is None else [each[..., begin:stop] for each in self.plan.positions],
            )
            ended = torch.from_numpy((self.lengths > begin) & (self.lengths <= stop)).to(local_device())
            if not kept:
                kept = logits
            kept = [torch.where(ended[m][:, None], new, kept[m]) for m, new in enumerate(logits)]
        return kept

    def after(self, chosen: np.ndarray) -> list[torch.Tensor]:
        """As the base says. A step is as wide as ranks that share positions need it; what follows the token is void."""
        tokens_MBW = np.zeros((*chosen.shape, self.multiple), np.int64)
        tokens_MBW[..., 0] = chosen
        axial = None
        if self.beyond is not None:
            new_MBW = (self.beyond + self.ends - self.lengths)[..., None] + np.arange(self.multiple)
            axial = [np.broadcast_to(each, (3, *each.shape)) for each in new_MBW]
        logits = self._run(
            list(tokens_MBW), self.ends, np.zeros_like(self.ends), lambda micro_batch, vpp: NO_VISUAL_INPUTS, axial
        )
        self.ends += 1
        return logits

    def _beyond_prompts(self) -> np.ndarray | None:
        """(M, B): of positions on three axes the first one after each prompt, which is the same on all axes."""
        if self.plan.positions is None:
            return None
        last = [
            [int(rows[:, b, : self.lengths[m, b]].max()) for b in range(rows.shape[1])]
            for m, rows in enumerate(self.plan.positions)
        ]
        return np.array(last, np.int64) + 1

    def _rows(self, begin: int, stop: int) -> VisualOf:
        if (begin, stop) == (0, self.plan.seq_length):
            return self.visual.visual

        def rows(micro_batch: int, vpp: int) -> VisualInputs:
            return of_stretch(self.visual.visual(micro_batch, vpp), self.plan.micro_batch_size, begin, stop)

        return rows

    def _run(
        self,
        tokens: list[np.ndarray],
        starts: np.ndarray,
        wanted: np.ndarray,
        visual: VisualOf,
        axial: list[np.ndarray] | None,
    ) -> list[torch.Tensor]:
        config, place = self.engine.model.config, self.engine.groups.place
        wanted_MB = torch.from_numpy(wanted).to(local_device())
        steps = [
            CachedStep.of(
                cache,
                tuple(starts[m].tolist()),
                tokens[m].shape[1],
                wanted_MB[m],
                cp=(config.context_parallel_size, place.cp),
                dtype=config.params_dtype,
            )
            for m, cache in enumerate(self.caches)
        ]
        return run_cached_step(config, self.engine.chunks, tokens, steps, visual, cp_rank=place.cp, axial=axial)


class RecomputingDecoder(Decoder):
    """Computes the whole sequence for each token, as training does. The plan has space for the answers."""

    def __init__(self, engine: Engine, plan: StepPlan, visual: VisualPass, lengths: np.ndarray) -> None:
        """As for `CachedDecoder`; the plan's sequences are longer than `lengths` by the longest answer."""
        self.engine, self.plan, self.visual = engine, plan, visual
        self.tokens = [batch.copy() for batch in plan.tokens]
        self.ends = lengths.copy()

    def first(self) -> list[torch.Tensor]:
        """As the base says."""
        found = []
        for m, local_BSV in enumerate(self.visual.logits(replace(self.plan, tokens=tuple(self.tokens)))):
            full_BSV = gather_sequence(local_BSV.transpose(0, 1), self.engine.groups.decoder.cp).transpose(0, 1)
            found.append(full_BSV[torch.arange(full_BSV.shape[0]), torch.from_numpy(self.ends[m] - 1)])
        return found

    def after(self, chosen: np.ndarray) -> list[torch.Tensor]:
        """As the base says."""
        for m, b in np.ndindex(*self.ends.shape):
            self.tokens[m][b, self.ends[m, b]] = chosen[m, b]
        self.ends += 1
        return self.first()
