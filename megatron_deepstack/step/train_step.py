"""One training step of a rank: encode -> route -> schedule -> route back -> encoder backward -> finalise.

The loss is the sum of token losses over the global number of targets, so it depends on neither layout nor packing.
Gradients of decoder and encoder are sums over a replica's ranks and over replicas, divided by that same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_deepstack.config.choices import EncoderPlacement
from megatron_deepstack.model.layers.expert_load import ExpertLoad
from megatron_deepstack.parallel.reduce import loss_and_tokens
from megatron_deepstack.planning.batch.step_plan import StepPlan
from megatron_deepstack.planning.budget.pipeline import forward_passes
from megatron_deepstack.planning.budget.received_rows import rest_on_host
from megatron_deepstack.platform.compute.device import device_memory_bytes
from megatron_deepstack.platform.compute.upload import upload
from megatron_deepstack.routing.exchange import send_rows
from megatron_deepstack.step.clock import StepClock
from megatron_deepstack.step.encode import EncoderPass
from megatron_deepstack.step.engine import Engine
from megatron_deepstack.step.host_rows import HostRows
from megatron_deepstack.step.inline import InlineEncoder
from megatron_deepstack.step.schedule import ScheduleResult, VisualOf, run_schedule
from megatron_deepstack.step.staging import StagedStep, StepInputs, views_of
from megatron_deepstack.step.timeline import ENCODE, ENCODER_BACKWARD
from megatron_deepstack.step.visual import ReceivedRows


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Sum of token losses and number of targets of the whole global batch."""

    total: float
    num_tokens: int
    experts: ExpertLoad | None = None
    """How evenly tokens were spread over experts; None for a decoder without them, and where nothing is trained."""

    @property
    def mean(self) -> float:
        """Mean loss per target; 0 where there is none."""
        return self.total / self.num_tokens if self.num_tokens else 0.0

    @property
    def gradient_scale(self) -> float:
        """What turns sums of gradients into gradients of the mean; 0 where there is no target."""
        return 1.0 / self.num_tokens if self.num_tokens else 0.0


def forward_backward(engine: Engine, plan: StepPlan, data: torch.Tensor | StagedStep, clock: StepClock) -> StepLoss:
    """Run a step up to final gradients in the main-grad buffers. Collective over all ranks.

    Args:
        engine: As for `gradient_sums`.
        plan: The same.
        data: The same.
        clock: The same.

    Returns:
        The same. The gradients are divided by the number of targets; a step without targets leaves zeros.
    """
    loss = gradient_sums(engine, plan, data, clock)
    for ddp in engine.wrapped:
        ddp.scale_gradients(loss.gradient_scale)
    return loss


def gradient_sums(engine: Engine, plan: StepPlan, data: torch.Tensor | StagedStep, clock: StepClock) -> StepLoss:
    """Run a step up to sums of gradients in the main-grad buffers. Collective over all ranks.

    The optimizer divides them by the number of targets when it clips them, in one pass over its own part of them.

    Args:
        engine: This rank's model and groups. What buffers held before is overwritten.
        plan: The step of this rank's replica, as this rank has it.
        data: The step's data on their way to the device; or the views of `plan.routes.units`, in order, on the host:
            uint8 (N, image, image, 3) or normalised float (N, 3, image, image). Where views have any size, all values
            of all views in one dimension (see `Views`).
        clock: Gets the durations of the parts.

    Returns:
        Loss and targets of the whole global batch, the same on all ranks.
    """
    staged = data if isinstance(data, StagedStep) else StagedStep(engine, plan, data)
    assert staged.plan is plan, "another step was staged"
    inputs = staged.take()
    if engine.graphs is not None:
        engine.graphs.before_step(plan)
    for ddp in engine.wrapped:
        ddp.zero_grad_buffer()
    if engine.tally is not None:
        engine.tally.clear()
    step = _inline if engine.parallel.encoder_placement is EncoderPlacement.INLINE else _spread
    result = step(engine, plan, inputs, clock)
    with clock.part("finalise"):
        tally = engine.tally
        table = None if tally is None else tally.table_LE1
        total, num_tokens, counted = loss_and_tokens(result.losses, result.num_tokens, engine.groups, table)
        _finalise(engine)
    experts = None if tally is None else tally.load(counted, num_tokens)
    return StepLoss(total=total, num_tokens=num_tokens, experts=experts)


def held_out_loss(engine: Engine, plan: StepPlan, pixels: torch.Tensor) -> StepLoss:
    """Compute the loss of a global batch that nothing is learned from. Collective over all ranks.

    Its rows rest where those of a training step do.

    Args:
        engine: This rank's model and groups.
        plan: The batch of this rank's replica.
        pixels: As for `forward_backward`.

    Returns:
        Loss and targets of the whole global batch, the same on all ranks.
    """
    inputs = StagedStep(engine, plan, pixels).take()
    with torch.no_grad():
        if engine.parallel.encoder_placement is EncoderPlacement.INLINE:
            visual = InlineEncoder(engine.model.encoder, inputs.views, plan.routes, indices=inputs.rows).of
        else:
            encoded = EncoderPass(engine.model.encoder, inputs.views, engine.encoded_at_once)
            visual = _received(engine, plan, encoded, inputs, requires_grad=False).of
            encoded.release_rows()
        result = run_schedule(
            engine.model.config,
            engine.chunks,
            plan,
            visual,
            cp_rank=engine.groups.place.cp,
            forward_only=True,
            uploaded=inputs.micro_batches,
        )
    total, num_tokens, _ = loss_and_tokens(result.losses, result.num_tokens, engine.groups)
    return StepLoss(total=total, num_tokens=num_tokens)


class VisualPass:
    """A pass for answers, whose rows are encoded and routed once and used by any number of schedules."""

    def __init__(self, engine: Engine, plan: StepPlan, pixels: torch.Tensor) -> None:
        """Encode the views and send their rows. Collective over the replica.

        Args:
            engine: This rank's model and groups.
            plan: A step of this rank's replica.
            pixels: As for `forward_backward`.
        """
        self.engine, views = engine, views_of(plan, upload(pixels))
        with torch.no_grad():
            if engine.parallel.encoder_placement is EncoderPlacement.INLINE:
                self.visual = InlineEncoder(engine.model.encoder, views, plan.routes).of
                return
            rows = EncoderPass(engine.model.encoder, views, engine.encoded_at_once).rows
            stored = send_rows(rows, plan.routes, engine.groups.replica)
            self.visual = ReceivedRows(stored, plan.routes, requires_grad=False).of

    def logits(self, plan: StepPlan) -> list[torch.Tensor]:
        """On the last stage, logits (B, S, V / tp) of each micro-batch. Collective over the replica."""
        with torch.no_grad():
            result = run_schedule(
                self.engine.model.config,
                self.engine.chunks,
                plan,
                self.visual,
                cp_rank=self.engine.groups.place.cp,
                forward_only=True,
                keep_logits=True,
            )
        return result.logits


def _spread(engine: Engine, plan: StepPlan, inputs: StepInputs, clock: StepClock) -> ScheduleResult:
    with clock.part(ENCODE):
        encoded = EncoderPass(engine.model.encoder, inputs.views, engine.encoded_at_once)
    with clock.part("route"):
        rows = _received(engine, plan, encoded, inputs, requires_grad=encoded.trains)
        encoded.release_rows()
    with clock.part("schedule"):
        result = _schedule(engine, plan, rows.of, inputs, clock)
    if encoded.trains:
        with clock.part("route back"):
            table = rows.return_gradients(engine.groups.replica, inputs.exchange)
        with clock.part(ENCODER_BACKWARD):
            encoded.backward(table)
    return result


def _received(
    engine: Engine, plan: StepPlan, encoded: EncoderPass, inputs: StepInputs, *, requires_grad: bool
) -> ReceivedRows | HostRows:
    """Send rows, and keep those received on the device, or on the host where they are too many for it."""
    table, routes, group, parallel = encoded.rows, plan.routes, engine.groups.replica, engine.parallel
    num_bytes = len(routes.stored_rows) * table.shape[1] * table.element_size()
    if rest_on_host(parallel.rows_on_host, num_bytes, device_memory_bytes()):
        order = forward_passes(parallel.pipeline, parallel.virtual_pipeline, plan.num_micro_batches)
        return HostRows(
            table,
            routes,
            group,
            engine.row_memory,
            order,
            requires_grad=requires_grad,
            index=inputs.exchange,
            positions=inputs.rows,
        )
    stored = send_rows(table, routes, group, inputs.exchange)
    return ReceivedRows(stored, routes, requires_grad=requires_grad, positions=inputs.rows)


def _inline(engine: Engine, plan: StepPlan, inputs: StepInputs, clock: StepClock) -> ScheduleResult:
    encoder = InlineEncoder(engine.model.encoder, inputs.views, plan.routes, clock.timeline, inputs.rows)
    with clock.part("schedule"):
        return _schedule(engine, plan, encoder.of, inputs, clock)


def _schedule(engine: Engine, plan: StepPlan, visual: VisualOf, inputs: StepInputs, clock: StepClock) -> ScheduleResult:
    return run_schedule(
        engine.model.config,
        engine.chunks,
        plan,
        visual,
        cp_rank=engine.groups.place.cp,
        timeline=clock.timeline,
        uploaded=inputs.micro_batches,
    )


def _finalise(engine: Engine) -> None:
    """Add up the gradients of decoder and encoder over the ranks."""
    if engine.decoder_ddp:
        finalize_model_grads(engine.decoder_ddp, None)
    if engine.encoder_ddp is not None:
        engine.encoder_ddp.finish_grad_sync()
