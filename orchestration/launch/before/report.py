"""Tables for the user: the checks, where ranks go, and all that a launch would do."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.training.guard.node_board import Beat
from orchestration.launch.before.checks import Check
from orchestration.launch.before.placement import Demand, Seat
from orchestration.launch.driver.control import Status
from orchestration.launch.driver.record import LaunchRecord, RankPlace, RunState
from orchestration.launch.environment import RankEnvironment

_UNSEEN = ("PYTHONWARNINGS",)
_ROWS = 16
"""Ranks that are listed one by one; more are listed by node."""


def checks_table(findings: Sequence[Check]) -> Table:
    """First what is wrong, and on which node; then the rest."""
    table = Table(title="checks", title_justify="left")
    for heading in ("", "node", "check", "found", "expected"):
        table.add_column(heading, overflow="fold")
    for one in sorted(findings, key=lambda finding: finding.sound):
        mark = Text("ok", style="green") if one.sound else Text("WRONG", style="bold red")
        table.add_row(mark, *map(Text, (one.node, one.check, one.found, one.expected)))
    return table


def seats_table(seats: Sequence[Seat]) -> Table:
    """Ranks, their nodes, and their coordinates."""
    table = Table(title=f"{len(seats)} ranks", title_justify="left")
    for heading in ("ranks", "node", "tp", "cp", "dp", "pp"):
        table.add_column(heading)
    for group in _rows(seats):
        places = [seat.place for seat in group]
        ranks = _span([seat.rank for seat in group])
        node = f"{group[0].node.address} ({group[0].node.host})"
        spans = (_span(sorted({getattr(place, axis) for place in places})) for axis in ("tp", "cp", "dp", "pp"))
        table.add_row(ranks, node, *spans)
    return table


def whole_plan(
    recipe: Recipe,
    demand: Demand,
    seats: Sequence[Seat],
    findings: Sequence[Check],
    environment: RankEnvironment,
    *,
    cluster: str,
    resumes_from: str,
) -> Group:
    """All that `launch` would do.

    Args:
        recipe: The run's recipe.
        demand: What the run needs.
        seats: Where each rank would run, by rank.
        findings: Results of the checks.
        environment: The variables that ranks would receive; the values of private ones are not shown.
        cluster: The cluster in words.
        resumes_from: Where training would begin, in words.

    Returns:
        Something for rich to print.
    """
    launching = recipe.launch
    variables = {**environment.shown, **dict.fromkeys(environment.private, "(set)")}
    listed = "\n".join(f"    {name}={value}" for name, value in sorted(variables.items()) if name not in _UNSEEN)
    lines = (
        f"cluster    {cluster}",
        f"ranks      {demand.num_ranks} workers of Ray Train, each with {demand.unit}",
        "command    megatron_deepstack.training.main.train on each rank, as under torchrun",
        f"run folder {Path(recipe.run_dir).absolute()}; what ranks print: logs/rank_*.log and .err",
        f"starts     {resumes_from}",
        f"restarts   {launching.max_failures} at most (launch.max_failures), after a worker or node has died; waits "
        f"{launching.start_seconds:.0f} s for nodes (launch.start_seconds)",
        f"variables of each rank, besides RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...:\n{listed}",
    )
    return Group(*map(Text, lines), seats_table(seats), checks_table(findings))


def status_text(status: Status) -> str:
    """A run in a few lines."""
    record, last = status.record, status.recent[-1] if status.recent else None
    lines = [f"{status.run_dir}: {status.state}"]
    if record is not None and record.outcome and record.state is not RunState.FINISHED:
        lines.append(f"  because    {record.outcome}")
    if last is not None:
        left = "" if status.seconds_left is None else f", {_duration(status.seconds_left)} left"
        speed = f"{last['tokens_per_second']:,.0f} tokens/s"
        loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
        lines.append(f"  step       {last['step']} of {status.num_steps}, loss {loss}, {speed}{left}")
    lines.append(f"  checkpoint {'none yet' if status.checkpoint is None else f'after step {status.checkpoint}'}")
    if record is not None:
        lines += _launch_lines(record, status.state)
    else:
        lines += _local_lines(status)
    return "\n".join(lines)


def status_document(status: Status) -> dict[str, Any]:
    """A run as values for JSON: numbers that are not known, or not finite, are None."""
    record, last, owner = status.record, status.recent[-1] if status.recent else {}, status.owner
    driver = record if record is not None else owner
    started = record.pid_since if record is not None else owner.started if owner is not None else None
    places = {one.rank: asdict(one) for one in record.ranks} if record is not None else {}
    known = sorted(places) or sorted(status.beats)
    return {
        "run_dir": str(status.run_dir),
        "state": status.state,
        "launcher": status.launcher,
        "because": record.outcome if record is not None else "",
        "step": last.get("step", 0),
        "num_steps": status.num_steps,
        "loss": _finite(last.get("loss")),
        "tokens_per_second": _finite(last.get("tokens_per_second")),
        "seconds_left": _finite(status.seconds_left),
        "checkpoint": status.checkpoint,
        "driver": None if driver is None else {"host": driver.host, "pid": driver.pid, "since": started},
        "cluster": record.cluster or None if record is not None else None,
        "ranks": [_rank_document(rank, places.get(rank, {}), status.beats.get(rank)) for rank in known],
        "waiting_for": record.waiting_for if record is not None else "",
        "restarts": [asdict(one) for one in record.restarts] if record is not None else [],
        "max_failures": record.max_failures if record is not None else None,
        "exit_code": status.exit_code,
    }


def _rank_document(rank: int, place: Mapping[str, Any], beat: Beat | None) -> dict[str, Any]:
    said = {} if beat is None else {"host": beat.host, "pid": beat.pid, "doing": beat.doing}
    return {"rank": rank, "host": None, "address": None, "pid": None, "doing": None, **said, **place}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _local_lines(status: Status) -> list[str]:
    """What is known of a run that has no driver of `launch`."""
    owner = status.owner
    if owner is None:
        return [f"  started by {status.launcher}, not `launch`; no process works in the folder now"]
    lines = [f"  started by {status.launcher}: {owner}, since {owner.since}"]
    first = status.beats.get(0)
    if first is not None:
        hosts = ", ".join(sorted({one.host for one in status.beats.values()}))
        lines.append(f"  ranks      {len(status.beats)} on {hosts}; rank 0 in {first.doing}")
    return lines


def _launch_lines(record: LaunchRecord, state: str) -> list[str]:
    lines = [f"  driver     pid {record.pid} on {record.host}, cluster {record.cluster or 'of its own'}"]
    if record.ranks:
        lines.append(f"  ranks      {by_node(record.ranks)}")
    if record.waiting_for and state == RunState.RESTARTING:
        lines.append(f"  waits      {record.waiting_for}")
    lines.append(f"  restarts   {len(record.restarts)} of at most {record.max_failures}")
    lines += [f"    {_clock(one.time)} {one.reason}" for one in record.restarts]
    return lines


def by_node(ranks: Sequence[RankPlace]) -> str:
    """Nodes with their ranks, in rank order."""
    nodes: dict[str, list[int]] = {}
    for one in ranks:
        nodes.setdefault(f"{one.host} ({one.address})", []).append(one.rank)
    return ", ".join(f"{_span(held)} on {node}" for node, held in nodes.items())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _rows(seats: Sequence[Seat]) -> list[list[Seat]]:
    """A line for each rank, or for each node if there are many ranks."""
    if len(seats) <= _ROWS:
        return [[seat] for seat in seats]
    by_node: dict[str, list[Seat]] = {}
    for seat in seats:
        by_node.setdefault(seat.node.id, []).append(seat)
    return list(by_node.values())


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
