"""What a node has to say before a run starts on it; `gather` runs on the node, in a process that sees its GPUs.

Whatever goes wrong becomes a text in the facts, so that all nodes' problems are shown at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megatron_deepstack
import orchestration
from megatron_deepstack import __version__
from megatron_deepstack.checkpoint.folder import step_folders
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.attributes import finished_attributes
from megatron_deepstack.platform.files.run_disk import write_probe
from megatron_deepstack.platform.network import interface_of

PACKAGES = ("torch", "megatron-core", "transformer-engine", "ray", "zarr", "numpy")
TOKENS = ".launch-tokens"
"""Folder in the run folder for a file of each node; gone after the checks."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What was found: a value, or the reason why there is none."""

    value: str = ""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node."""

    address: str
    host: str
    versions: dict[str, str]
    gpu_memories: tuple[int, ...]
    interface: str | None
    folder: Fact
    """The working folder that relative paths start from."""
    run_dir: Fact
    """The token that was written there."""
    free_bytes: int
    """Of the file system of the run folder."""
    stores: dict[str, Fact] = field(default_factory=dict)
    """Plan hash by path."""
    files: dict[str, Fact] = field(default_factory=dict)
    """Other paths that ranks read."""
    num_checkpoints: int = 0
    """In the run folder already."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What every node is asked."""

    recipe: Recipe
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Private variables, without which stores in buckets cannot be read."""


def gather(questions: Questions, address: str, token: str) -> NodeFacts:
    """All facts of this node.

    Args:
        questions: What to look for.
        address: Address of this node in the cluster.
        token: Name of the file that this node leaves in the run folder, for the other nodes to see.

    Returns:
        The facts; what could not be found out is a fault in them.
    """
    from megatron_deepstack.platform.compute.device import gpu_memories

    folder = _find(partial(_enter, questions.folder))
    recipe, run_dir = questions.recipe, Path(questions.recipe.run_dir)
    written = _find(partial(_write_token, run_dir, token))
    return NodeFacts(
        address=address,
        host=socket.gethostname(),
        versions=_versions(),
        gpu_memories=gpu_memories(),
        interface=interface_of(address),
        folder=folder,
        run_dir=written,
        free_bytes=0 if written.fault else shutil.disk_usage(run_dir).free,
        stores={path: _find(partial(_plan_hash, path)) for path in stores_of(recipe)},
        files={path: _find(partial(_readable, path)) for path in files_of(recipe)},
        num_checkpoints=0 if written.fault else len(step_folders(run_dir)),
    )


def tokens_seen(questions: Questions) -> tuple[str, ...]:
    """Files that nodes have left in the run folder, as this node sees it."""
    folder = Path(questions.recipe.run_dir) / TOKENS
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def forget_tokens(run_dir: Path) -> None:
    """Remove them."""
    shutil.rmtree(run_dir / TOKENS, ignore_errors=True)


def stores_of(recipe: Recipe) -> tuple[str, ...]:
    """Stores that ranks read."""
    data = recipe.data
    held_out = data.validation_store if recipe.train.validation_interval else None
    return tuple(path for path in (data.store, *(data.stores or ()), held_out) if path is not None)


def files_of(recipe: Recipe) -> tuple[str, ...]:
    """Other paths that ranks read."""
    tokenizer = (recipe.data.tokenizer,) if recipe.data.tokenizer else ()
    return (*tokenizer, *(recipe.train.init_from or ()))


def _find(find: Callable[[], str]) -> Fact:
    try:
        return Fact(value=find())
    except Exception as error:
        text = str(error) or type(error).__name__
        return Fact(fault=text.splitlines()[0])


def _enter(folder: str) -> str:
    os.chdir(folder)
    return folder


def _write_token(run_dir: Path, token: str) -> str:
    write_probe(run_dir / TOKENS / token, token)
    return token


def _plan_hash(path: str) -> str:
    return finished_attributes(Location.parse(path)).plan_hash


def _readable(path: str) -> str:
    if Path(path).is_dir():
        return f"{len(os.listdir(path))} files"
    with open(path, "rb") as file:
        file.read(1)
    return f"{Path(path).stat().st_size} bytes"


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "megatron-deepstack": f"{__version__} {_our_code()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _our_code() -> str:
    """A hash of our sources: a node with an older checkout may have the same version number."""
    digest = hashlib.sha256()
    for package in (megatron_deepstack, orchestration):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def differing(versions: Sequence[dict[str, str]]) -> list[str]:
    """Packages whose versions are not the same everywhere."""
    return [name for name in versions[0] if len({one.get(name) for one in versions}) > 1]
