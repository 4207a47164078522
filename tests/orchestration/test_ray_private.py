"""What is taken from Ray without its promise is still there: an upgrade that moves a name fails here first."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import orchestration
from orchestration import ray_private
from orchestration.cluster import import_ray


@pytest.fixture(scope="module", autouse=True)
def ray_settings() -> None:
    import_ray(None)


@pytest.mark.parametrize("name", ray_private.NAMES)
def test_a_name(name: str) -> None:
    assert getattr(ray_private, name) is not None
    assert ray_private.NAMES[name].why


@pytest.mark.parametrize("place", ray_private.MEMBERS)
def test_members(place: str) -> None:
    """A field of a class may be known by its annotation or by the parameter that fills it."""
    module, _, name = place.partition(":")
    holder = getattr(importlib.import_module(module), name)
    known = {*dir(holder), *getattr(holder, "__annotations__", ())}
    if callable(holder):
        known |= set(inspect.signature(holder).parameters)
        known |= set(re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", inspect.getsource(holder)))
        known |= set(re.findall(r"self\.(\w+)\b.*=", inspect.getsource(holder)))
    assert set(ray_private.MEMBERS[place]) - known == set()


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ray_private.Taken("ray.train.v2.nowhere", "Thing", "for a test")
    monkeypatch.setitem(ray_private.NAMES, "Thing", gone)
    with pytest.raises(ImportError, match=r"this Ray has no ray\.train\.v2\.nowhere\.Thing \(for a test\)"):
        ray_private.Thing  # noqa: B018
    with pytest.raises(AttributeError, match="takes no name 'Other'"):
        ray_private.Other  # noqa: B018


def test_nothing_else_takes_private_names() -> None:
    """Neither `ray._private` nor the inside of Ray Train is named anywhere else in the program."""
    found = [
        f"{path.name}:{number}"
        for path in Path(orchestration.__file__).parent.rglob("*.py")
        if path.name != "ray_private.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bray\._[^_]|ray\.[\w.]*\._|ray\.train\.v2", line)
    ]
    assert found == []
