"""Building what one rank holds: the encoder, and its decoder chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_deepstack.config.choices import Fp8Scaling, Part, Precision
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig, SpeedConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.language import LanguageChunk
from megatron_deepstack.model.layers.fp8 import require_fp8
from megatron_deepstack.model.layers.lora import NO_ADAPTERS, WithAdapter, is_adapter
from megatron_deepstack.model.layers.megatron_config import decoder_config
from megatron_deepstack.model.layers.specs import uses_transformer_engine
from megatron_deepstack.model.layers.speed import Speed, decide_speed
from megatron_deepstack.model.rules import Rules, Source, fill, mark_split
from megatron_deepstack.model.vision.encoder import VisualEncoder
from megatron_deepstack.model.weights import decoder_rules, encoder_rules
from megatron_deepstack.parallel.groups import Groups
from megatron_deepstack.planning.slots import decoder_slots, stage_chunks
from megatron_deepstack.platform.compute.capabilities import capabilities
from megatron_deepstack.platform.compute.device import local_device

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
AUTOMATIC = SpeedConfig()


@dataclass(frozen=True, slots=True)
class RankModel:
    """Everything this rank holds. The encoder is the same on every rank."""

    config: TransformerConfig
    """The decoder's, shared with the schedule."""
    speed: Speed
    """The fusions and overlaps that were decided on."""
    encoder: VisualEncoder
    chunks: list[LanguageChunk]
    """Decoder chunks by virtual stage."""
    encoder_rules: Rules
    chunk_rules: list[Rules]


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    groups: Groups,
    lora: LoraConfig = NO_ADAPTERS,
    fp8_scaling: Fp8Scaling = Fp8Scaling.TENSORWISE,
    speed: SpeedConfig = AUTOMATIC,
) -> RankModel:
    """Build this rank's modules, uninitialised. Collective over tp, pp and the embedding group.

    Args:
        model: The recipe's model.
        parallel: The layout.
        precision: Dtype of parameters and activations.
        groups: Process groups of the layout.
        lora: Adapters; none by default.
        fp8_scaling: How FP8 tensors are scaled, under that precision.
        speed: Fusions and overlaps; by default what this machine and its packages allow.

    Returns:
        Encoder and decoder chunks on this rank's device, with the rules of their parameters.

    Raises:
        ConfigError: This rank cannot run the recipe's layers, precision or fusions; nothing has been built then.
    """
    require_fp8(precision, fp8_scaling, model.layers)
    engine = uses_transformer_engine(model.layers)
    decided = decide_speed(
        speed,
        capabilities(),
        language=model.language,
        parallel=parallel,
        precision=precision,
        layers=model.layers,
        lora=lora,
    )
    config = decoder_config(model.language, parallel, precision, fp8_scaling, decided, engine=engine, lora=lora)
    device = local_device()
    slots = decoder_slots(model)
    chunks = [
        _on(device, LanguageChunk(config, model.language, model.layers, lora, chunk, slots, groups.decoder))
        for chunk in stage_chunks(model.language.num_layers, parallel)
        if chunk.pp == groups.place.pp
    ]
    encoder = _on(device, VisualEncoder(model, precision, groups.encoder, decided, lora))
    chunk_rules = [decoder_rules(chunk, model, lora) for chunk in chunks]
    for chunk, rules in zip(chunks, chunk_rules, strict=True):
        mark_split(chunk, rules)
    return RankModel(
        config=config,
        speed=decided,
        encoder=encoder,
        chunks=chunks,
        encoder_rules=encoder_rules(encoder, model),
        chunk_rules=chunk_rules,
    )


def _on(device: torch.device, module: ModuleT) -> ModuleT:
    """The module on a device; unchanged if it is there already, since fake tensors cannot be moved."""
    there = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if there else module.to(device)


def fill_model(rank_model: RankModel, source: Source, tp_group: torch.distributed.ProcessGroup) -> None:
    """Set all parameters from full published tensors. Not collective: every rank reads what it needs.

    Args:
        rank_model: What this rank holds; changed in place.
        source: Published name and shape to the full tensor.
        tp_group: The decoder's tp group, whose rank and size choose the shards.
    """
    fill(rank_model.encoder, rank_model.encoder_rules, source, 0, 1)
    for chunk, rules in zip(rank_model.chunks, rank_model.chunk_rules, strict=True):
        fill(chunk, rules, source, tp_group.rank(), tp_group.size())


def fill_adapters(rank_model: RankModel, source: Source, tp_group: torch.distributed.ProcessGroup) -> None:
    """Set the parameters of adapters alone, those of the encoder too. Not collective.

    Args:
        rank_model: What this rank holds; changed in place.
        source: Published name and shape to the full tensor.
        tp_group: The decoder's tp group, whose rank and size choose the shards.
    """
    fill(rank_model.encoder, rank_model.encoder_rules, source, 0, 1, wanted=is_adapter)
    for chunk, rules in zip(rank_model.chunks, rank_model.chunk_rules, strict=True):
        fill(chunk, rules, source, tp_group.rank(), tp_group.size(), wanted=is_adapter)


def freeze(rank_model: RankModel, trainable: tuple[Part, ...]) -> None:
    """Let only the named parts learn. In a part with adapters, only these do; unused ViT layers never do.

    Args:
        rank_model: What this rank holds; changed in place.
        trainable: Parts that learn. The newline belongs to the projector.

    Raises:
        ConfigError: Nothing is left to train.
    """
    if not trainable:
        raise ConfigError(["train.trainable: empty; name at least one of vision, projector, language"])
    encoder = rank_model.encoder
    _freeze_part(encoder.vit, learns=Part.VISION in trainable)
    for layer in encoder.vit.unused_layers():
        layer.requires_grad_(False)
    _freeze_part(encoder.projector, learns=Part.PROJECTOR in trainable)
    if encoder.newline is not None:
        adapted = any(is_adapter(name) for name, _ in encoder.projector.named_parameters())
        encoder.newline.requires_grad_(Part.PROJECTOR in trainable and not adapted)
    for chunk in rank_model.chunks:
        _freeze_part(chunk, learns=Part.LANGUAGE in trainable)


def _freeze_part(module: torch.nn.Module, *, learns: bool) -> None:
    """Let a part learn, or its adapters if it has some, or nothing of it."""
    adapters_alone = any(is_adapter(name) for name, _ in module.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns and is_adapter(name) is adapters_alone)


def merge_adapters(rank_model: RankModel) -> RankModel:
    """The model with its adapters added to the weights they stand beside, in place; the same without adapters."""
    for module in _adapted(rank_model):
        module.merge()
    return _without_adapter_rules(rank_model)


def drop_adapters(rank_model: RankModel) -> RankModel:
    """The model without its adapters, in place: the weights they stand beside are as they were."""
    for module in _adapted(rank_model):
        module.drop()
    return _without_adapter_rules(rank_model)


def _adapted(rank_model: RankModel) -> list[WithAdapter]:
    parts: list[torch.nn.Module] = [rank_model.encoder, *rank_model.chunks]
    return [module for part in parts for module in part.modules() if isinstance(module, WithAdapter)]


def _without_adapter_rules(rank_model: RankModel) -> RankModel:
    encoder, *chunks = (
        {name: rule for name, rule in one.items() if not is_adapter(name)}
        for one in (rank_model.encoder_rules, *rank_model.chunk_rules)
    )
    return replace(rank_model, encoder_rules=encoder, chunk_rules=chunks)
