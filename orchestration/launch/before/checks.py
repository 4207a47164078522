"""What is wrong where, before anything starts: nodes' facts against what the run needs, as a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.budget.footprint import checkpoint_bytes, checkpoints_at_once, rank_bytes
from megatron_deepstack.platform.files.run_disk import size_text
from orchestration.launch.before.placement import Seat
from orchestration.launch.before.probe import Fact, NodeFacts, differing, files_of, stores_of


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    node: str
    check: str
    found: str
    expected: str
    sound: bool


@dataclass(frozen=True, slots=True)
class Link:
    """A small all-reduce between two nodes."""

    first: str
    second: str
    seconds: float | None
    """None if there was no way through."""
    fault: str = ""


def judge(
    recipe: Recipe,
    seats: Sequence[Seat],
    facts: Sequence[NodeFacts],
    seen: Mapping[str, Sequence[str]],
    links: Sequence[Link],
    *,
    uses_gpus: bool,
) -> tuple[Check, ...]:
    """Every check on every node.

    Args:
        recipe: The run's recipe.
        seats: Where each rank will run, by rank.
        facts: What each node reported.
        seen: By address of a node, the tokens that this node finds in the run folder.
        links: Results of the trials of links between neighbours.
        uses_gpus: Whether each rank has a GPU.

    Returns:
        All findings, good and bad.
    """
    findings = list(_versions(facts))
    for one in facts:
        ranks_here = sum(seat.node.address == one.address for seat in seats)
        findings += _node(recipe, one, ranks_here, len(seats), uses_gpus)
        findings += _stores(recipe, one, facts)
        findings += _files(recipe, one)
        findings += _shared(one, facts, seen)
    return (*findings, *map(_link, links))


def failures(findings: Sequence[Check]) -> tuple[Check, ...]:
    """The findings that keep a run from starting."""
    return tuple(finding for finding in findings if not finding.sound)


def in_words(findings: Sequence[Check]) -> str:
    """Findings for an error: a line each."""
    return "\n".join(
        f"  {one.node}: {one.check}: found {one.found}, expected {one.expected}" for one in failures(findings)
    )


def _versions(facts: Sequence[NodeFacts]) -> Iterator[Check]:
    different = set(differing([one.versions for one in facts]))
    for one in facts:
        for name in one.versions:
            usual = Counter(other.versions.get(name) for other in facts).most_common(1)[0][0]
            if name in different and one.versions[name] != usual:
                yield Check(one.address, f"version of {name}", one.versions[name], f"{usual}, as elsewhere", False)
    if not different:
        found = ", ".join(f"{name} {value}" for name, value in facts[0].versions.items() if value != "none")
        yield Check("all nodes", "versions", found, "the same everywhere", True)


def _node(recipe: Recipe, one: NodeFacts, ranks_here: int, num_ranks: int, uses_gpus: bool) -> Iterator[Check]:
    if uses_gpus:
        found = len(one.gpu_memories)
        yield Check(one.address, "GPUs", f"{found} seen by torch", f"{ranks_here}", found >= ranks_here)
        needed, least = rank_bytes(recipe, num_ranks), min(one.gpu_memories, default=0)
        yield Check(
            one.address,
            "GPU memory",
            size_text(least),
            f"{size_text(needed)} for weights and optimizer",
            least >= needed,
        )
    yield Check(
        one.address,
        "network interface",
        one.interface or "none",
        f"one that holds {one.address}",
        one.interface is not None,
    )
    if _has_relative_paths(recipe):
        yield _of_fact(one.address, "working folder", one.folder, "the driver's, which relative paths start from")
    kept = max(checkpoints_at_once(recipe) - one.num_checkpoints, 1)
    needed = kept * checkpoint_bytes(recipe)
    if not one.run_dir.fault:
        yield Check(
            one.address,
            "disk",
            f"{size_text(one.free_bytes)} free",
            f"{size_text(needed)} for {kept} checkpoint{'s' if kept > 1 else ''}",
            one.free_bytes >= needed,
        )


def _stores(recipe: Recipe, one: NodeFacts, facts: Sequence[NodeFacts]) -> Iterator[Check]:
    for path in stores_of(recipe):
        fact = one.stores[path]
        hashes = Counter(other.stores[path].value for other in facts if not other.stores[path].fault)
        usual = hashes.most_common(1)[0][0] if hashes else ""
        if fact.fault:
            yield Check(one.address, f"store {path}", fact.fault, "a finished store, readable here", False)
        else:
            same = fact.value == usual
            yield Check(one.address, f"store {path}", f"plan {fact.value[:12]}", f"plan {usual[:12]}", same)


def _files(recipe: Recipe, one: NodeFacts) -> Iterator[Check]:
    for path in files_of(recipe):
        yield _of_fact(one.address, path, one.files[path], "readable here")


def _shared(one: NodeFacts, facts: Sequence[NodeFacts], seen: Mapping[str, Sequence[str]]) -> Iterator[Check]:
    """The run folder is one folder: each node sees the files of all."""
    if one.run_dir.fault:
        yield Check(one.address, "run folder", one.run_dir.fault, "writable here", False)
        return
    wanted = {other.run_dir.value: other.address for other in facts if not other.run_dir.fault}
    missing = sorted(address for token, address in wanted.items() if token not in seen.get(one.address, ()))
    found = f"the files of {', '.join(missing)} are not there" if missing else "the files of all nodes"
    yield Check(one.address, "run folder", found, "one folder that all nodes share", not missing)


def _link(link: Link) -> Check:
    nodes = f"{link.first} - {link.second}"
    found = link.fault if link.seconds is None else f"1 MiB in {link.seconds * 1000:.1f} ms"
    return Check(nodes, "all-reduce", found, "a way through", link.seconds is not None)


def _of_fact(node: str, check: str, fact: Fact, expected: str) -> Check:
    return Check(node, check, fact.fault or fact.value, expected, not fact.fault)


def _has_relative_paths(recipe: Recipe) -> bool:
    paths = (recipe.run_dir, *stores_of(recipe), *files_of(recipe))
    return any("://" not in path and not PurePath(path).is_absolute() for path in paths)
