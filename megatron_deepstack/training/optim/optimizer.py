"""AdamW for decoder and encoder: two of Megatron's optimizers, chained, so that clipping sees one global norm.

The decoder's states belong to dp x cp, the encoder's to the whole world, since every rank holds the encoder. Groups
differ in part (learning rate, weight decay) and in whether they decay at all: norms, biases and other vectors do not.
Each trainable parameter is in exactly one group, which is checked (`groups`). Rates and decays come from the recipe in
every step, never from a checkpoint, so a resumed run may change them. Transformer Engine's or Apex's fused AdamW is
taken where it is installed: Megatron chooses it when it is imported. Otherwise it is PyTorch's, fused or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_deepstack.config.choices import MomentDtype, Part, Precision
from megatron_deepstack.config.schema import OptimizerConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers.speed import Speed
from megatron_deepstack.platform.compute.capabilities import Capabilities
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.training.optim.groups import ParameterGroup, Rates, check_cover, parameter_groups, part_of
from megatron_deepstack.training.optim.lr import learning_rate
from megatron_deepstack.training.optim.skipping import SkippingOptimizer, Trusted


@dataclass(frozen=True, slots=True)
class StepNorm:
    """What an optimizer step reports."""

    gradient_norm: float
    applied: bool
    """False where a gradient was not finite and the step was left out."""


class Optimizer:
    """The optimizer of a run on one rank."""

    def __init__(self, engine: Engine, config: OptimizerConfig, precision: Precision, num_steps: int) -> None:
        """Build the optimizer. Collective over all ranks.

        Args:
            engine: This rank's wrapped model and its groups.
            config: The section `optimizer`.
            precision: Of the parameters; below float32, the optimizer keeps float32 copies of them.
            num_steps: Steps of the whole run, for the schedule of the learning rate.
        """
        self.config, self.num_steps = config, num_steps
        megatron_config = _megatron_config(config, precision, engine.parallel.distributed_optimizer, engine.model.speed)
        parts = []
        if engine.decoder_ddp:
            parts.append(
                get_megatron_optimizer(megatron_config, engine.decoder_ddp, _overrides(), use_gloo_process_groups=False)
            )
        if engine.encoder_ddp is not None:
            parts.append(
                get_megatron_optimizer(
                    megatron_config,
                    [engine.encoder_ddp],
                    _overrides(),
                    use_gloo_process_groups=False,
                    pg_collection=engine.groups.encoder,
                )
            )
        self.chained = SkippingOptimizer([single for part in parts for single in part.chained_optimizers])
        _fuse(self.chained, engine.model.speed.optimizer_fusion)
        check_cover(engine, self.chained)
        self.rates = Rates(config)
        self.groups: tuple[ParameterGroup, ...] = parameter_groups(engine, self.rates)
        self._kinds = [_kind_of(group) for group in self.chained.param_groups]

    def step(self, step: int, trusted: Trusted = math.isfinite, scale: float = 1.0) -> StepNorm:
        """Scale, clip and apply the gradients, if they are trusted, and clear them. Collective over all ranks.

        Args:
            step: 0-based; determines the learning rate.
            trusted: From the global gradient norm to whether the step may be applied; all ranks must decide alike.
            scale: What the gradients are multiplied by before anything else, the same on all ranks. Sums over targets
                become gradients of the mean by it, see `StepLoss.gradient_scale`.

        Returns:
            The norm of the scaled gradients before clipping, and whether the gradients were applied.
        """
        for group, (part, decays) in zip(self.chained.param_groups, self._kinds, strict=True):
            group["lr"] = self.lr(part, step)
            group["weight_decay"] = self.rates.weight_decay(part) if decays else 0.0
        applied = self.chained.step_if(trusted, scale=scale, clip=self.config.clip_grad)
        self.chained.zero_grad()  # Megatron leaves `grad` an alias of the buffer; the next backward would double it
        return StepNorm(gradient_norm=self.chained.gradient_norm, applied=applied)

    def lr(self, part: Part, step: int) -> float:
        """The learning rate of a part of the model.

        Args:
            part: Tower, projector or decoder.
            step: 0-based.

        Returns:
            The rate.
        """
        return learning_rate(self.config, step, self.num_steps, self.rates.peak_lr(part))


def _fuse(chained: ChainedOptimizer, fused: bool) -> None:
    """Let PyTorch's AdamW, which is used where no other package has a fused one, update a group in one kernel.

    Megatron offers no such choice when it builds it. PyTorch reads it from the groups in every step, and no state
    exists yet.
    """
    for single in chained.chained_optimizers:
        if isinstance(single.optimizer, (torch.optim.AdamW, torch.optim.Adam)):
            for group in single.optimizer.param_groups:
                group["fused"] = fused


def require_moments(config: OptimizerConfig, machine: Capabilities) -> None:
    """Check that this rank can keep Adam's moments as the recipe wants them. Not collective.

    Args:
        config: The section `optimizer`.
        machine: What this rank can use.

    Raises:
        ConfigError: It cannot.
    """
    if config.moment_dtype is not MomentDtype.BF16:
        return
    problem = machine.engine_problem if machine.gpu else "this process sees no GPU"
    if problem is not None:
        what = "bf16 needs a GPU and the AdamW of Transformer Engine"
        raise ConfigError([f"optimizer.moment_dtype: {what}: {problem}; use fp32"])


def _megatron_config(
    config: OptimizerConfig, precision: Precision, distributed: bool, speed: Speed
) -> MegatronOptimizerConfig:
    """Rates are constants here: each step sets its own, and megatron-core 0.19 finds a checkpoint's groups by them."""
    low = precision is not Precision.FP32
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=1.0,
        min_lr=0.0,
        weight_decay=0.0,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=0.0,  # `SkippingOptimizer` clips
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
        use_distributed_optimizer=distributed,
        overlap_param_gather=speed.overlap_param_gather,
        **_low_moments(config, speed),
    )


def _low_moments(config: OptimizerConfig, speed: Speed) -> dict[str, Any]:
    """Megatron's words for moments in bf16. Main parameters stay whole float32 numbers, so that a checkpoint of them
    is one for every optimizer; Megatron would also keep their lower halves alone.
    """
    if config.moment_dtype is MomentDtype.FP32:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": False,
        "main_grads_dtype": speed.gradient_dtype,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }


_PART_NUMBERS = {part: float(number) for number, part in enumerate(Part, start=1)}


def _overrides() -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's rules for groups. `lr_mult` numbers the part and `wd_mult` says whether the group decays.

    By these two every supported Megatron recognises a checkpoint's groups; they multiply nothing, since each step sets
    rates and decays itself.
    """
    rules: dict[ParamKey, ParamGroupOverride] = {
        _key("vectors", lambda parameter, name: parameter.dim() == 1): ParamGroupOverride(wd_mult=0.0)
    }
    for part, number in _PART_NUMBERS.items():
        rules[_key(part.value, partial(_belongs, part))] = ParamGroupOverride(lr_mult=number)
    return rules


def _kind_of(group: dict[str, Any]) -> tuple[Part, bool]:
    """Part of one of Megatron's groups, and whether it decays."""
    (part,) = [part for part, number in _PART_NUMBERS.items() if number == group["lr_mult"]]
    return part, group["wd_mult"] != 0.0


def _belongs(part: Part, parameter: torch.nn.Parameter, name: str) -> bool:
    return part_of(name) is part


def _key(label: str, rule: object) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=label, fn=rule))
