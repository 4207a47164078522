"""The decoder's part of one pipeline chunk: word embedding, transformer layers with injection, output layer, loss.

Built from Megatron-Core's embedding, TransformerBlock and output layer, without GPTModel, which later versions
deprecate. Base visual rows replace placeholders right after the embedding; stacks enter through `context`.

Legend: S sequence (this rank's shard), B micro-batch, H hidden, V padded vocabulary, N slots of the chunk, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.choices import Layers
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig
from megatron_deepstack.config.sizes import padded_vocabulary
from megatron_deepstack.model.layers.attention import Packs
from megatron_deepstack.model.layers.experts import ExpertLayer, membership_at_hand
from megatron_deepstack.model.layers.injection import put_rows
from megatron_deepstack.model.layers.key_value_cache import CachedStep
from megatron_deepstack.model.layers.megatron_config import DecoderConfig, without_gradient_accumulation
from megatron_deepstack.model.layers.plain_linears import FEW_ROWS_OF_HEAD, product
from megatron_deepstack.model.layers.rotary import AxialRotary, angles_at, build_rotary, restarted
from megatron_deepstack.model.layers.specs import decoder_block, respect_no_grad, uses_transformer_engine
from megatron_deepstack.model.layers.token_step import TokenLayers
from megatron_deepstack.parallel.context import gather_sequence, own_part
from megatron_deepstack.planning.slots import Chunk, chunk_slots
from megatron_deepstack.platform.compute.device import local_device

LEAST_ANGLES = 1024
"""Positions of the smallest table of angles, half a megabyte."""


@dataclass(frozen=True, slots=True)
class VisualInputs:
    """The rows one chunk adds in one micro-batch."""

    base_rows: torch.Tensor | None = None
    """(R0, H) base visual rows, on the chunk with the embedding."""
    base_positions: torch.Tensor | None = None
    """(R0,) int64 flat positions s * B + b."""
    slot_rows: torch.Tensor | None = None
    """(N, R, H) rows of the chunk's slots."""
    slot_positions: torch.Tensor | None = None
    """(N, R) int64 flat positions."""


NO_VISUAL_INPUTS = VisualInputs()


@dataclass(frozen=True, slots=True)
class HeadTargets:
    """The positions of one micro-batch whose loss is computed; the output layer sees no others."""

    rows: torch.Tensor
    """(R,) int64 flat positions s * B + b in this rank's shard; equally many on all tp ranks."""
    labels: torch.Tensor
    """(1, N) int64 labels of the rows of all tp ranks that share the sequence, one rank after another. Where a row only
    fills up, any id that is not negative."""

    @classmethod
    def everywhere(cls, labels_BS: torch.Tensor) -> HeadTargets:
        """Targets at all positions, without sequence parallelism.

        Args:
            labels_BS: int64 labels, none of them negative.
        """
        rows = torch.arange(labels_BS.numel(), device=labels_BS.device)
        return cls(rows=rows, labels=labels_BS.t().reshape(1, -1))


class LanguageChunk(LanguageModule):
    """One rank's decoder layers of one virtual stage, with embedding or output layer where the chunk has them."""

    def __init__(
        self,
        config: DecoderConfig,
        language: LanguageConfig,
        layers: Layers,
        lora: LoraConfig,
        chunk: Chunk,
        slots: tuple[int, ...],
        groups: ProcessGroupCollection,
    ) -> None:
        """`slots` are all of the decoder's; the chunk takes its own. Collective over tp and the embedding group."""
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # the schedule asks for it
        self.vp_stage = chunk.vpp if config.virtual_pipeline_model_parallel_size else None
        self.chunk = chunk
        self.slots = chunk_slots(chunk, slots)
        self.pre_process, self.post_process = chunk.has_embedding, chunk.has_head
        self.share_embeddings_and_output_weights = language.tied_embeddings
        self.language = language
        self.vocab_size = language.vocab_size
        self.padded_vocabulary = padded_vocabulary(language.vocab_size, config.tensor_model_parallel_size)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=self.padded_vocabulary,
                max_sequence_length=0,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=True,
                tp_group=groups.tp,
            )
        self.rotates_packs = uses_transformer_engine(layers)
        """Whether the layers rotate each sample of a packed row by themselves, in a kernel that knows its bounds."""
        self.rotary = build_rotary(language, config, groups)
        self.decoder = TransformerBlock(
            config=config,
            spec=decoder_block(language, layers, lora, chunk.first, chunk.stop, self.slots, config.kept),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=self.vp_stage,
        )
        respect_no_grad(self.decoder)
        self.token_layers: TokenLayers | None = None
        """What takes steps of one token to which the chunk adds no rows; None leaves them to `decoder`."""
        self.expert_layers = [module for module in self.decoder.modules() if isinstance(module, ExpertLayer)]
        if self.post_process:
            self.output_layer = self._build_output_layer(config, groups)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def _build_output_layer(self, config: TransformerConfig, groups: ProcessGroupCollection) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocabulary,
            config=without_gradient_accumulation(config),
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=groups.tp,
        )

    def prepare_tokens(self) -> None:
        """Let steps of one token take the short way through the layers, where there is one; for answers alone.

        Linears must have been simplified before.
        """
        if TokenLayers.can_take(self.decoder):
            self.token_layers = TokenLayers(self.decoder)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Called by the schedule with the previous stage's hidden states, (S, B, H), possibly in a list of one."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        targets: HeadTargets | None,
        visual: VisualInputs = NO_VISUAL_INPUTS,
        packs: Packs | CachedStep | None = None,
        positions_3BS: torch.Tensor | None = None,
        membership_KT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One micro-batch through the chunk. Collective over tp and cp.

        Args:
            tokens_BS: int64, this rank's cp shard in zigzag order.
            targets: Where the loss is computed. None asks for logits.
            visual: Rows that this chunk adds.
            packs: Where the samples of a packed row (B = 1) end; or the step of a generation with a key/value cache.
            positions_3BS: int64 positions in time, line and column of this rank's shard, for a decoder that has them.
            membership_KT: Whose the tokens are, for the loss that balances experts; see `layers.experts`.

        Returns:
            Hidden states (S, B, H) for the next stage; on the last, losses (1, N) of the targets, or without them the
            logits (S, B, V / tp), of which a step with a cache gives only those it wants: (1, B, V / tp).
        """
        hidden_SBH = self._embed(tokens_BS, visual) if self.pre_process else None
        rotary, packs = self._angles(tokens_BS.shape[1] * self.config.context_parallel_size, packs, positions_3BS)
        if isinstance(packs, CachedStep) and self.token_layers is not None and _is_short(packs, visual):
            hidden_SBH = self.decoder.input_tensor if hidden_SBH is None else hidden_SBH
            hidden_SBH = self.token_layers(hidden_SBH, rotary, packs)
        else:
            with membership_at_hand(self.expert_layers, membership_KT):
                hidden_SBH = self.decoder(
                    hidden_states=hidden_SBH,
                    attention_mask=None,
                    context=visual.slot_rows,
                    context_mask=visual.slot_positions,
                    rotary_pos_emb=rotary,
                    packed_seq_params=packs,
                    padding_mask=membership_KT,
                )
        if not self.post_process:
            return hidden_SBH
        if isinstance(packs, CachedStep):
            return self._wanted_logits(hidden_SBH, packs)
        if targets is None:
            return self._logits(hidden_SBH)
        rows_R1H = hidden_SBH.reshape(-1, hidden_SBH.shape[-1]).index_select(0, targets.rows)[:, None]
        return self.compute_language_model_loss(targets.labels, self._logits(rows_R1H))

    def angles_of_rows(self, length: int, num_rows: int) -> torch.Tensor:
        """Return angles of padded rows, of the shape and dtype that layers get in training.

        Args:
            length: Tokens of a row over cp.
            num_rows: Rows of a micro-batch.

        Returns:
            Angles for queries and keys of this cp rank; those of the first positions where positions have three axes.
        """
        shape = 3, num_rows, length // self.config.context_parallel_size
        positions = torch.zeros(shape, dtype=torch.int64, device=local_device())
        return self._angles(length, None, positions)[0]

    def _angles(
        self, length: int, packs: Packs | CachedStep | None, positions_3BS: torch.Tensor | None
    ) -> tuple[torch.Tensor, Packs | CachedStep | None]:
        """By what queries and keys of `length` tokens (over cp) are rotated, and what the layers get of `packs`."""
        if isinstance(self.rotary, AxialRotary):
            assert positions_3BS is not None, "the decoder has positions on three axes, and the step has none"
            one_row = isinstance(packs, Packs) and not self.rotates_packs
            return self.rotary(positions_3BS), packs.as_one_row() if isinstance(packs, Packs) and one_row else packs
        if isinstance(packs, CachedStep):
            assert packs.cache is not None
            assert packs.positions is not None
            return angles_at(self.rotary, packs.positions, packs.cache.capacity), packs
        # A table is made and uploaded once for each power of 2, not for each length; `packed_seq` leaves it whole.
        rotary = self.rotary(max(LEAST_ANGLES, 1 << (length - 1).bit_length()), packed_seq=True)[:length]
        group = self.pg_collection.cp
        if packs is None:
            return (own_part(rotary, (length,), group) if group.size() > 1 else rotary), packs
        if self.rotates_packs:
            return rotary, packs
        return restarted(rotary, packs.ends, group), packs.as_one_row()

    def _embed(self, tokens_BS: torch.Tensor, visual: VisualInputs) -> torch.Tensor:
        hidden_SBH = self.embedding(input_ids=tokens_BS, position_ids=None)
        if torch.is_grad_enabled() and not hidden_SBH.requires_grad:
            hidden_SBH = hidden_SBH.detach().requires_grad_()  # frozen decoder: the schedule needs a graph even of text
        if self.language.embedding_multiplier != 1.0:
            hidden_SBH = hidden_SBH * self.language.embedding_multiplier
        if visual.base_rows is None:
            return hidden_SBH
        assert visual.base_positions is not None
        return put_rows(hidden_SBH, visual.base_rows, visual.base_positions)

    def _logits(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Logits with the vocabulary's padding out of reach: a padded column must not take part in the softmax."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight)
        return self._without_padding(logits_SBV)

    def _wanted_logits(self, hidden_SBH: torch.Tensor, step: CachedStep) -> torch.Tensor:
        """(1, B, V / tp): of one token of each sequence. Collective over tp and cp where they share the sequence."""
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.tp_group)
        if self.config.context_parallel_size > 1:
            hidden_SBH = gather_sequence(hidden_SBH, self.cp_group)
        rows = torch.arange(hidden_SBH.shape[1], device=hidden_SBH.device)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        logits_BV = product(hidden_SBH[step.wanted, rows], weight, few=FEW_ROWS_OF_HEAD)
        return self._without_padding(logits_BV[None])

    def _without_padding(self, logits_SBV: torch.Tensor) -> torch.Tensor:
        if self.language.logits_scaling != 1.0:
            logits_SBV = logits_SBV / self.language.logits_scaling
        width = logits_SBV.shape[-1]
        first_padded = max(self.vocab_size - self.tp_group.rank() * width, 0)
        if first_padded < width:
            logits_SBV[..., first_padded:] = torch.finfo(logits_SBV.dtype).min
        return logits_SBV


def _is_short(step: CachedStep, visual: VisualInputs) -> bool:
    """Whether `TokenLayers` can take a step."""
    return step.width == 1 and visual.slot_rows is None
