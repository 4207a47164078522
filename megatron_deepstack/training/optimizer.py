"""AdamW for decoder and encoder: two of Megatron's optimizers, chained, so that clipping sees one global norm.

The decoder's states belong to dp x cp, the encoder's to the whole world, since every rank holds the encoder. Each
trainable parameter is in exactly one group, which is checked. Groups differ in part (peak learning rate) and in weight
decay, which norms, biases and other vectors do not get. Rates and decay come from the recipe in every step,
never from a checkpoint, whose groups Megatron tells apart by less than ours differ in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import OptimizerConfig
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.training.lr import learning_rate


@dataclass(frozen=True, slots=True)
class StepNorm:
    """What an optimizer step reports."""

    gradient_norm: float
    applied: bool
    """False where a gradient was not finite and the step was left out."""


class Optimizer:
    """The optimizer of a run on one rank."""

    def __init__(self, engine: Engine, config: OptimizerConfig, precision: Precision, num_steps: int) -> None:
        """Collective over all ranks."""
        self.config, self.num_steps = config, num_steps
        megatron_config = _megatron_config(config, precision, engine.parallel.distributed_optimizer)
        parts = []
        if engine.decoder_ddp:
            parts.append(
                get_megatron_optimizer(
                    megatron_config, engine.decoder_ddp, _overrides(config), use_gloo_process_groups=False
                )
            )
        if engine.encoder_ddp is not None:
            parts.append(
                get_megatron_optimizer(
                    megatron_config,
                    [engine.encoder_ddp],
                    _overrides(config),
                    use_gloo_process_groups=False,
                    pg_collection=engine.groups.encoder,
                )
            )
        self.chained = ChainedOptimizer([single for part in parts for single in part.chained_optimizers])
        _check_cover(engine, self.chained)
        self._groups = [(group["max_lr"], group["wd_mult"]) for group in self.chained.param_groups]

    def step(self, step: int) -> StepNorm:
        """Apply the gradients of 0-based step `step`. Collective over all ranks."""
        for group, (peak, decay) in zip(self.chained.param_groups, self._groups, strict=True):
            group["lr"] = learning_rate(self.config, step, self.num_steps, peak)
            group["weight_decay"] = self.config.weight_decay * decay
        applied, norm, _ = self.chained.step()
        self.chained.zero_grad()  # Megatron leaves `grad` an alias of the buffer; the next backward would double it
        return StepNorm(gradient_norm=float(norm or 0.0), applied=bool(applied))


def _megatron_config(config: OptimizerConfig, precision: Precision, distributed: bool) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=precision is Precision.BF16,
        params_dtype=torch.bfloat16 if precision is Precision.BF16 else torch.float32,
        use_distributed_optimizer=distributed,
    )


def peak_lr(config: OptimizerConfig, part: Part) -> float:
    """Peak learning rate of a part."""
    special = {Part.VISION: config.vision_lr, Part.PROJECTOR: config.projector_lr}.get(part)
    return config.lr if special is None else special


def part_of(name: str) -> Part:
    """Part that a parameter belongs to, by its name in the wrapped module."""
    bare = name.removeprefix("module.")
    if bare.startswith("vit."):
        return Part.VISION
    return Part.PROJECTOR if bare.startswith("projector.") or bare == "newline" else Part.LANGUAGE


def _overrides(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's rules for groups: vectors have no decay, parts have peak rates of their own.

    `lr_mult` is there because Megatron recognises a checkpoint's groups by it and `wd_mult`, and not by `max_lr`.
    """
    rules: dict[ParamKey, ParamGroupOverride] = {
        _key("vectors", lambda parameter, name: parameter.dim() == 1): ParamGroupOverride(wd_mult=0.0)
    }
    for part in Part:
        peak = peak_lr(config, part)
        rules[_key(part.value, partial(_belongs, part))] = ParamGroupOverride(max_lr=peak, lr_mult=peak)
    return rules


def _belongs(part: Part, parameter: torch.nn.Parameter, name: str) -> bool:
    return part_of(name) is part


def _key(label: str, rule: object) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=rule))


def _check_cover(engine: Engine, chained: ChainedOptimizer) -> None:
    """Every trainable element of this rank is in one group (its shard, under the distributed optimizer)."""
    if engine.parallel.distributed_optimizer:
        return
    trained = sum(p.numel() for ddp in engine.wrapped for p in ddp.parameters() if p.requires_grad)
    grouped = sum(p.numel() for group in chained.param_groups for p in group["params"])
    assert trained == grouped, f"{trained} trainable parameters, {grouped} in optimizer groups"
