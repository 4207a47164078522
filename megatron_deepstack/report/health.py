"""Unusual events of a run: steps left out, spikes, unreadable samples, slow ranks, resumptions, stalls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_deepstack.report.drawing.frame import table
from megatron_deepstack.report.drawing.svg import Markup, element
from megatron_deepstack.report.records import Metrics

_MOST_EVENTS = 60
_MOST_SAMPLES = 12
_SHOWN_STALL = 0.01
"""The page mentions stalls if they took at least this many seconds together."""
_LONG_STALL = 0.5
"""A stall is listed if it took more than this share of its step's time."""


@dataclass(frozen=True, slots=True)
class Event:
    """An unusual event at one step."""

    step: int
    kind: str
    about: str


def events(metrics: Metrics) -> list[Event]:
    """All unusual events of a run, in order of steps."""
    return [event for record in metrics.records for event in _events_of(record, record["step"] in metrics.resumed_at)]


def _events_of(record: Mapping[str, Any], resumed: bool) -> Iterator[Event]:
    step, samples = record["step"], _samples(record.get("samples") or ())
    if resumed:
        yield Event(step, "resumed", "first step after a checkpoint was read")
    if record.get("applied") is False:
        loss = record.get("loss")
        what = "loss" if isinstance(loss, float) and not math.isfinite(loss) else "gradient"
        because = str(record.get("skipped_because") or f"{what} not finite")  # older records lack the reason
        yield Event(step, "left out", f"{because}{samples}")
    if record.get("spike"):
        yield Event(step, "spike", f"loss {record.get('loss', math.nan):.4g}{samples}")
    if record.get("unreadable"):
        names = _samples(record.get("unreadable_samples") or ())
        yield Event(step, "unreadable", f"{record['unreadable']} samples left out of the loss{names}")
    if record.get("slow_ranks"):
        yield Event(step, "slow", f"ranks {', '.join(map(str, record['slow_ranks']))}")
    stall = record.get("stall_seconds") or 0.0
    if stall > _LONG_STALL * record.get("step_seconds", math.inf):
        yield Event(step, "stall", f"training stood still for {stall:.2f} s for a checkpoint")


def _samples(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MOST_SAMPLES} more" if len(names) > _MOST_SAMPLES else ""
    return f"; samples {', '.join(names[:_MOST_SAMPLES])}{more}"


def health_section(metrics: Metrics) -> Iterator[Markup]:
    """A sentence or a table about the events of a run, and the time that saving took."""
    found = events(metrics)
    stalls = sum(value for _, value in metrics.series("stall_seconds"))
    seconds = sum(value for _, value in metrics.series("step_seconds"))
    if not found:
        yield element("p", "No step was left out, no loss stood out, no rank was slow, and the run was never resumed.")
    if seconds and stalls >= _SHOWN_STALL:
        share = stalls / seconds
        yield element("p", f"Saving held training up for {stalls:.2f} s in all, {share:.2%} of the steps' time.")
    if found:
        rows = [(str(event.step), _kind(event.kind), event.about) for event in found[:_MOST_EVENTS]]
        yield table(("step", "what", "details"), rows)
    if len(found) > _MOST_EVENTS:
        yield element("p", f"and {len(found) - _MOST_EVENTS} more")


def _kind(kind: str) -> Markup:
    return element("span", kind, class_="alarm" if kind in ("left out", "spike") else None)
