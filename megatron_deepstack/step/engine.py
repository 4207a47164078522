"""A rank's model as it trains: modules, gradient buffers, and the rank's process groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.schema import ModelConfig, ParallelConfig
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.layers.expert_load import ExpertTally, tally_of
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.budget.encoder_views import AtOnce, kept_at_once
from megatron_deepstack.step.gradients import GradientBuffers
from megatron_deepstack.step.host_rows import RowMemory
from megatron_deepstack.step.layer_graphs import LayerGraphs


@dataclass(frozen=True, slots=True)
class Engine:
    """What a training step works on."""

    model: RankModel
    model_config: ModelConfig
    decoder_ddp: list[DistributedDataParallel]
    """Wrapped chunks, data-parallel over dp x cp; empty while the decoder is frozen."""
    encoder_ddp: DistributedDataParallel | None
    """The wrapped encoder, data-parallel over all ranks of the run; None while it is frozen."""
    groups: Groups
    parallel: ParallelConfig
    tally: ExpertTally | None = None
    """What counts the choices of experts while training; None for a decoder without them."""
    graphs: LayerGraphs | None = None
    """The CUDA graphs of the layers under `speed.cuda_graphs`."""
    row_memory: RowMemory = field(default_factory=RowMemory)
    """Where rows rest that are too many for the device (`parallel.rows_on_host`)."""

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """What the schedule runs."""
        return list(self.decoder_ddp) or list(self.model.chunks)

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """Everything with gradient buffers."""
        return [*self.decoder_ddp, *([] if self.encoder_ddp is None else [self.encoder_ddp])]

    @property
    def encoded_at_once(self) -> AtOnce:
        """Whose activations of a trained tower are kept at a time."""
        return kept_at_once(
            self.model_config,
            self.parallel,
            self.model.encoder.config.params_dtype.itemsize,
            fused=self.model.speed.activation_fusion,
        )

    def gather_parameters(self) -> None:
        """Make every rank's parameters whole after an update. Collective over dp x cp.

        Under `speed.overlap_param_gather` they are gathered by the next step's forward pass. Whatever else reads them
        before (a checkpoint, validation, a comparison) must call this first. Without that setting it does nothing.
        """
        for ddp in self.decoder_ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)


def build_engine(model: RankModel, model_config: ModelConfig, parallel: ParallelConfig, groups: Groups) -> Engine:
    """Give trainable parts their gradient buffers. Call it after freezing. Collective over all ranks.

    The encoder has buffers of its own: its shards under the distributed optimizer are cut over the whole world, the
    decoder's over dp x cp. The decoder's reduction runs beside what is left of the schedule and the encoder's
    backward; the encoder's own does not, since a rank that holds no view in a step has no gradient to start it.

    Args:
        model: What this rank holds; a part with no parameter that requires a gradient gets no buffers.
        model_config: The recipe's model.
        parallel: Says whether the optimizer is distributed, and whether the reduction runs beside the backward.
        groups: The run's process groups.

    Returns:
        What a training step works on.
    """
    decoder_ddp = []
    if any(p.requires_grad for chunk in model.chunks for p in chunk.parameters()):
        decoder = DistributedDataParallelConfig(
            grad_reduce_in_fp32=model.speed.gradient_dtype is torch.float32,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=model.speed.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        decoder_ddp = [_wrap(model.config, chunk, decoder, groups.decoder) for chunk in model.chunks]
    encoder_ddp = None
    if any(p.requires_grad for p in model.encoder.parameters()):
        encoder = DistributedDataParallelConfig(
            grad_reduce_in_fp32=model.speed.gradient_dtype is torch.float32,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        encoder_ddp = _wrap(model.encoder.config, model.encoder, encoder, groups.encoder)
    return Engine(
        model=model,
        model_config=model_config,
        decoder_ddp=decoder_ddp,
        encoder_ddp=encoder_ddp,
        groups=groups,
        parallel=parallel,
        tally=tally_of(model.chunks, model_config.language),
        graphs=LayerGraphs(model.chunks[0], groups.place.pp, parallel.pipeline) if model.speed.cuda_graphs else None,
    )


def _wrap(
    config: TransformerConfig,
    module: torch.nn.Module,
    ddp_config: DistributedDataParallelConfig,
    groups: ProcessGroupCollection,
) -> DistributedDataParallel:
    return GradientBuffers(config, ddp_config, module, pg_collection=groups)
