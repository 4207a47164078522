"""The estimate of a run in a terminal: memory by stage, time, FLOPs, bytes, the predicted timeline, other layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_deepstack.config.sizes import expert_layers
from megatron_deepstack.planning.budget.layouts import Layouts, describe, overrides
from megatron_deepstack.planning.budget.memory import RankMemory
from megatron_deepstack.planning.budget.parameters import active_parameters, model_parameters
from megatron_deepstack.planning.budget.run_plan import NOT_MODELLED, MemoryPlan, RunPlan, boxes
from megatron_deepstack.platform.quantity import brief_time, data_scale, data_size, duration, flop_rate, number_of
from megatron_deepstack.report.drawing.timeline import Bar, RankLine, RecordedStep

_SHOWN_LAYOUTS = 8
_SHOWN_REASONS = 6
_WIDTH_OF_KINDS = 76
"""Columns that a line with all kinds of memory takes."""
_GB = 1e9
_MARKS = {"forward": "0123456789", "backward": "abcdefghij"}
_COLOURS = {"forward": "cyan", "backward": "blue", "encode": "yellow", "encoder backward": "red"}


def three_lines(plan: RunPlan) -> str:
    """The plan of a layout in three lines: memory, time, and what is computed."""
    fullest, limit = plan.fullest, plan.limit_bytes
    room = "" if limit is None else f" of {limit / _GB:.0f} GB free for tensors"
    verdict = "fits" if plan.fits else "does not fit"
    seconds, machine = plan.seconds, plan.machine
    mfu = "" if limit is None else f", MFU {plan.mfu:.0%}"
    return "\n".join(
        [
            f"plan: {describe(plan.recipe.parallel, plan.num_ranks)} on {plan.num_ranks} x {machine.name}: fullest "
            f"stage {fullest.stage} needs {data_size(fullest.memory.total)}{room} ({verdict})",
            f"plan: {brief_time(seconds.total)} a step predicted ({plan.tokens_per_second:,.0f} tokens/s{mfu}), "
            f"{duration(3600 * plan.hours)} for {number_of(plan.recipe.train.steps, 'step')}",
            f"plan: {_flops(plan.flops.total)}, {len(plan.load.micro_batches)} micro-batches a replica, bubble "
            f"{plan.bubble:.0%}, padding {plan.load.balance.padding:.0%}, imbalance {plan.load.balance.imbalance:.0%}",
        ]
    )


def estimate(plan: RunPlan, advice: str, width: int = 100) -> RenderableType:
    """Everything that is predicted of one layout.

    Args:
        plan: The plan.
        advice: Overrides that make it fit, where it does not.
        width: Columns of the terminal.

    Returns:
        Something that rich can print.
    """
    parts: list[RenderableType] = [_memory_table(plan, width)]
    if plan.fits:
        parts.append(Text("fits" if plan.limit_bytes is not None else "the memory of this machine is not known"))
    else:
        help_ = f"; it would with {advice}" if advice else "; no knob that is known here makes it fit: use more GPUs"
        parts.append(Text(f"does not fit{help_}", style="bold red"))
    parts += [Text(line) for line in _lines(plan)]
    parts += [*_timeline(plan, width), Text(f"lengths: {plan.load.source}", style="dim")]
    parts += [Text(f"not modelled in {what}: {text}", style="dim") for what, text in NOT_MODELLED.items()]
    return Group(*parts)


def _memory_table(plan: RunPlan, width: int) -> Table:
    """A line for each stage; where the terminal is too narrow for that, a line for each kind of memory."""
    free = "" if plan.limit_bytes is None else f", {plan.limit_bytes / _GB:.0f} GB free for tensors"
    scale, unit = data_scale(plan.fullest.memory.total)
    title = f"{unit} of a rank by stage ({plan.machine.name}{free})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("weights", "grads", "optim", "activ", "logits", "rows", "encoder", "moment", "total")
    values = [[f"{value / scale:.3g}" for value in (*astuple(one.memory), one.memory.total)] for one in plan.stages]
    lines = [["stage", *headings], *([str(one.stage), *row] for one, row in zip(plan.stages, values, strict=True))]
    if width < _WIDTH_OF_KINDS:
        lines = [list(line) for line in zip(*lines, strict=True)]
    for number, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _lines(plan: RunPlan) -> Iterator[str]:
    seconds, flops, sent = plan.seconds, plan.flops, plan.sent
    yield (
        f"step {brief_time(seconds.total)}: encode {brief_time(seconds.encode)}, schedule "
        f"{brief_time(seconds.schedule)} (bubble {plan.bubble:.1%}), encoder backward "
        f"{brief_time(seconds.encoder_backward)}, reduction {brief_time(seconds.reduction)}, optimizer "
        f"{brief_time(seconds.optimizer)}"
    )
    mfu = "" if plan.limit_bytes is None else f", MFU {plan.mfu:.1%}"
    yield (
        f"{plan.tokens_per_second:,.0f} tokens/s{mfu}; {duration(3600 * plan.hours)} for "
        f"{number_of(plan.recipe.train.steps, 'step')}; "
        f"padding {plan.load.balance.padding:.1%}, imbalance of replicas {plan.load.balance.imbalance:.1%}"
    )
    yield (
        f"model FLOPs of a step: decoder {_flops(flops.decoder)}, head {_flops(flops.head)}, encoder "
        f"{_flops(flops.encoder)}"
    )
    model = plan.recipe.model
    if expert_layers(model.language):
        total, active = sum(model_parameters(model).values()), active_parameters(model)
        yield f"parameters {total:,}, of which a token passes {active:,}; tokens spread evenly over experts"
    groups = plan.recipe.parallel
    inside = plan.machine.gpus_per_node
    kinds = (
        ("tensor parallel", sent.tensor, groups.tensor),
        ("tokens to experts", sent.expert, groups.expert),
        ("context parallel", sent.context, groups.tensor * groups.context),
        ("between stages", sent.pipeline, groups.tensor * groups.context * 2),
        ("rows", sent.rows, groups.tensor * groups.context * groups.pipeline),
        ("gradients and weights", sent.gradients, plan.num_ranks),
    )
    links = [f"{name} {data_size(value)} ({_link(ranks, inside)})" for name, value, ranks in kinds if value]
    yield "sent by a rank in a step: " + (", ".join(links) or "nothing")


def _link(ranks: int, inside: int) -> str:
    return "within a node" if ranks <= inside else "over the network"


def _flops(number: float) -> str:
    value, unit = flop_rate(number / 1e12)
    return f"{value} {unit.removesuffix('/s')}s"


def _timeline(plan: RunPlan, width: int) -> Iterator[Text]:
    """One line per stage; a column is an equal share of the simulated schedule."""
    columns = max(width - 12, 20)
    whole = max(end for stage in range(len(plan.stages)) for *_, end in boxes(plan, stage))
    shown = plan.timeline.num_micro_batches
    total = len(plan.load.micro_batches)
    some = f", the first {shown} of {total} micro-batches" if shown < total else ""
    yield Text(
        f"predicted timeline of {brief_time(whole)}{some}: digits forward, letters backward, E encoder, O optimizer"
    )
    for stage in range(len(plan.stages)):
        line = [(" ", "")] * columns
        for kind, micro_batch, _, begin, end in boxes(plan, stage):
            mark = "O" if kind in ("optimizer", "finalise") else "E"
            if micro_batch is not None:
                mark = _MARKS[kind][micro_batch % 10]
            first, stop = (
                int(begin / whole * columns),
                max(int(end / whole * columns), int(begin / whole * columns) + 1),
            )
            line[first:stop] = [(mark, _COLOURS.get(kind, "green"))] * (min(stop, columns) - first)
        text = Text(f"stage {stage:<4} ")
        for mark, colour in line:
            text.append(mark, style=colour)
        yield text


def predicted_step(plan: RunPlan) -> RecordedStep:
    """The predicted step in the form of a recorded one, for `timeline_drawing`."""
    start = plan.seconds.encode
    lines = []
    for one in plan.stages:
        bars = tuple(Bar(*box) for box in boxes(plan, one.stage))
        end = start + plan.timeline.seconds
        lines.append(RankLine(one.stage, f"stage {one.stage}", one.stage, bars, (start, end)))
    return RecordedStep(0, str(plan.recipe.parallel.encoder_placement), 0.0, tuple(lines))


def layouts_table(found: Layouts, num_ranks: int) -> RenderableType:
    """The layouts that fit, the fastest first, and why the others do not.

    Args:
        found: All layouts.
        num_ranks: Number of GPUs.

    Returns:
        Something that rich can print.
    """
    table = Table(title=f"Layouts on {num_ranks} GPUs, the fastest first", title_justify="left", pad_edge=False)
    for heading in ("layout", "s a step", "tokens/s", "MFU", "GB", "bubble", "padding", "hours"):
        table.add_column(heading, justify="left" if heading == "layout" else "right", overflow="fold")
    for plan in found.fitting[:_SHOWN_LAYOUTS]:
        table.add_row(
            describe(plan.recipe.parallel, num_ranks),
            f"{plan.seconds.total:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.0%}",
            f"{plan.fullest.memory.total / _GB:.0f}",
            f"{plan.bubble:.0%}",
            f"{plan.load.balance.padding:.0%}",
            f"{plan.hours:.3g}",
        )
    parts: list[RenderableType] = [table] if found.fitting else []
    rest = len(found.fitting) - _SHOWN_LAYOUTS
    if rest > 0:
        parts.append(Text(f"and {rest} more that fit", style="dim"))
    parts += [Text(line) for line in _reasons(found, num_ranks)]
    if found.fitting:
        parts.append(Text(f"the fastest: {overrides(found.fitting[0].recipe.parallel)}"))
    return Group(*parts)


def _reasons(found: Layouts, num_ranks: int) -> Iterator[str]:
    """Why other layouts cannot run, each reason once."""
    for plan in found.too_large[:_SHOWN_REASONS]:
        limit = (plan.limit_bytes or 0) / _GB
        yield (
            f"too large: {describe(plan.recipe.parallel, num_ranks)} needs {plan.fullest.memory.total / _GB:.0f} GB of "
            f"{limit:.0f}"
        )
    more = len(found.too_large) - _SHOWN_REASONS
    if more > 0:
        yield f"and {more} more need more memory"
    for reason, count in Counter(one.reason for one in found.refused).most_common(_SHOWN_REASONS):
        yield f"not possible ({count} {'layout' if count == 1 else 'layouts'}): {reason}"


def memory_values(plan: MemoryPlan, advice: str) -> dict[str, object]:
    """What is known of a layout without its time, as plain values, for programs.

    Args:
        plan: The plan of its memory.
        advice: Overrides that make it fit, where it does not.

    Returns:
        Bytes by name.
    """
    return {
        "gpu": plan.machine.name,
        "layout": describe(plan.recipe.parallel, plan.num_ranks),
        "overrides": overrides(plan.recipe.parallel),
        "fits": plan.fits,
        "limit_bytes": plan.limit_bytes,
        "advice": advice,
        "memory": [
            {**{one.name: getattr(stage.memory, one.name) for one in fields(RankMemory)}, "total": stage.memory.total}
            for stage in plan.stages
        ],
        "padding": plan.load.balance.padding,
        "imbalance": plan.load.balance.imbalance,
        "micro_batches": len(plan.load.micro_batches),
        "lengths": plan.load.source,
    }


def plan_values(plan: RunPlan, advice: str) -> dict[str, object]:
    """The estimate as plain values, for programs; bytes, seconds, and operations of a step.

    Args:
        plan: The plan.
        advice: Overrides that make it fit, where it does not.

    Returns:
        Bytes, seconds, and operations of a step by name.
    """
    return {
        **memory_values(plan, advice),
        "parameters": sum(model_parameters(plan.recipe.model).values()),
        "active_parameters": active_parameters(plan.recipe.model),
        "flops": {"decoder": plan.flops.decoder, "head": plan.flops.head, "encoder": plan.flops.encoder},
        "sent_bytes": {one.name: getattr(plan.sent, one.name) for one in fields(plan.sent)},
        "seconds": {
            **{one.name: getattr(plan.seconds, one.name) for one in fields(plan.seconds)},
            "total": plan.seconds.total,
        },
        "bubble": plan.bubble,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu if plan.limit_bytes is not None else None,
        "hours": plan.hours,
        "not_modelled": dict(NOT_MODELLED),
    }


def layouts_values(found: Layouts, num_ranks: int) -> dict[str, object]:
    """All layouts as plain values.

    Args:
        found: All layouts.
        num_ranks: Number of GPUs.

    Returns:
        The layouts that fit; those that are too large, with their memory alone; and those that are not possible.
    """
    return {
        "fitting": [plan_values(plan, "") for plan in found.fitting],
        "too_large": [memory_values(plan, "") for plan in found.too_large],
        "not_possible": [{"layout": describe(one.parallel, num_ranks), "reason": one.reason} for one in found.refused],
    }


def refusal(plan: RunPlan, advice: str) -> str:
    """Why a layout is not started, and what to do.

    Args:
        plan: A plan that does not fit.
        advice: Overrides that make it fit; empty for none.

    Returns:
        One sentence.
    """
    limit = (plan.limit_bytes or 0) / _GB
    knob = f"it would fit with {advice}" if advice else "use more GPUs"
    return (
        f"parallel: stage {plan.fullest.stage} needs about {plan.fullest.memory.total / _GB:.0f} GB and a rank has "
        f"{limit:.0f} GB free for tensors; {knob}, or start it with --anyway"
    )


def side_by_side(plans: Sequence[RunPlan]) -> Table:
    """The best few layouts in columns: seconds of each part, memory by kind."""
    table = Table(title="The best side by side", title_justify="left", pad_edge=False)
    table.add_column("")
    for plan in plans:
        table.add_column(describe(plan.recipe.parallel, plan.num_ranks), justify="right", overflow="fold")
    for part in (*(one.name for one in fields(plans[0].seconds)), "total"):
        table.add_row(f"{part}, s".replace("_", " "), *(f"{getattr(plan.seconds, part):.3g}" for plan in plans))
    for kind in (*(one.name for one in fields(RankMemory)), "total"):
        table.add_row(f"{kind}, GB", *(f"{getattr(plan.fullest.memory, kind) / _GB:.3g}" for plan in plans))
    return table
