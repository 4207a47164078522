"""What is compared: arms, stores, rates and seeds, read from claim.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deepstack.config.yaml_text import read_yaml

DEFAULT_STORE = "crops4"
_REPEAT = "repeat_global_view"


@dataclass(frozen=True, slots=True)
class StoreKind:
    """A store of each split."""

    name: str
    fields: Mapping[str, Any]
    """Fields of the recipe by which it is preprocessed."""
    repeats_global_view: bool
    """It is made of the default store, with the global view in the place of each crop."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the models that are compared."""

    name: str
    store: StoreKind
    fields: Mapping[str, Any]
    """Fields of the recipe in which it differs from the base."""

    @property
    def folder(self) -> str:
        """Its name as a part of a path."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


@dataclass(frozen=True, slots=True)
class Experiment:
    """Everything that is compared, and how."""

    base: Mapping[str, Any]
    pages: Mapping[str, int]
    """Pages of each kind in each split."""
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]

    @property
    def stores(self) -> tuple[StoreKind, ...]:
        """Every store that an arm reads, the default one first."""
        kinds = {arm.store.name: arm.store for arm in self.arms}
        return tuple(sorted(kinds.values(), key=lambda kind: (kind.name != DEFAULT_STORE, kind.name)))


def read_experiment(path: Path, *, quick: bool) -> Experiment:
    """Read the file of an experiment.

    Args:
        path: A YAML file like tools/claim/claim.yaml.
        quick: Apply its section `quick`.

    Returns:
        The experiment.

    Raises:
        SystemExit: An arm names a store that is not described, or `quick` names an arm that is not there.
    """
    document = read_yaml(path.read_text(encoding="utf-8"))
    changes = document["quick"] if quick else {}
    base, arms = dict(document["base"]), dict(document["arms"])
    if quick:
        base["train.steps"] = changes["steps"]
        missing = [name for name in changes["arms"] if name not in arms]
        if missing:
            raise SystemExit(f"{path}: quick names the arms {missing}, but the arms are {list(arms)}")
        arms = {name: arms[name] for name in changes["arms"]}
    return Experiment(
        base=base,
        pages=changes.get("pages", document["pages"]),
        learning_rates=tuple(changes.get("learning_rates", document["learning_rates"])),
        seeds=tuple(changes.get("seeds", document["seeds"])),
        arms=tuple(_arm(path, document["stores"], name, fields or {}) for name, fields in arms.items()),
    )


def _arm(path: Path, stores: Mapping[str, Any], name: str, fields: Mapping[str, Any]) -> Arm:
    store = fields.get("store", DEFAULT_STORE)
    if store not in stores:
        raise SystemExit(f"{path}: the arm {name!r} reads the store {store!r}, but the stores are {list(stores)}")
    described = dict(stores[store] or {})
    repeats = bool(described.pop(_REPEAT, False))
    own = {key: value for key, value in fields.items() if key != "store"}
    return Arm(name, StoreKind(store, described, repeats), {**described, **own})
