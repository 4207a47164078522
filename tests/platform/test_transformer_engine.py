"""Transformer Engine that is absent, loads, or is installed and broken: stand-in packages on the import path."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_deepstack.config.choices import Fp8Scaling, Layers, Precision
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers import fp8, specs
from megatron_deepstack.platform.compute.transformer_engine import engine_problem


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the answer nor modules of another test."""

    def forget() -> None:
        engine_problem.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(specs, "has_gpu", lambda: True)
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """A package `transformer_engine` whose `pytorch` runs `body` when it is imported."""
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text(f"from transformer_engine import loads\nloads.number += 1\n{body}\n")
    (package / "loads.py").write_text("number = 0\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_absent_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not specs.uses_transformer_engine(Layers.AUTO)
    with pytest.raises(ConfigError, match=r"is not installed \(pip install 'megatron-deepstack\[gpu\]'\)"):
        specs.uses_transformer_engine(Layers.TRANSFORMER_ENGINE)


def test_a_working_one_is_loaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "")
    assert [specs.uses_transformer_engine(layers) for layers in (Layers.AUTO, Layers.TRANSFORMER_ENGINE)] == [True] * 2
    assert not specs.uses_transformer_engine(Layers.LOCAL)
    assert sys.modules["transformer_engine.loads"].number == 1


BROKEN = {
    "cuDNN": (
        "raise RuntimeError('cuDNN 9.12 is required,\\n found 9.1')",
        "RuntimeError: cuDNN 9.12 is required, found",
    ),
    "a package": ("import pydantic_that_is_missing", "ModuleNotFoundError: No module named 'pydantic_that_is_missing'"),
    "a library": ("raise OSError('libtransformer_engine.so: cannot open')", "OSError: libtransformer_engine.so"),
}


@pytest.mark.parametrize(("body", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, reason: str) -> None:
    """`auto` goes on with local layers after one warning; whoever insists gets the reason; Megatron sees no engine."""
    install(monkeypatch, tmp_path, body)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert not any(specs.uses_transformer_engine(Layers.AUTO) for _ in range(2))
    assert len(caught) == 1
    with pytest.raises(ConfigError, match=reason):
        specs.uses_transformer_engine(Layers.TRANSFORMER_ENGINE)
    monkeypatch.setattr(fp8, "compute_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=reason):
        fp8.require_fp8(Precision.FP8, Fp8Scaling.TENSORWISE, Layers.AUTO)
    for module in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"):
        with pytest.raises(ImportError):
            importlib.import_module(module)


def test_without_a_gpu_it_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "raise RuntimeError('no driver')")
    monkeypatch.setattr(specs, "has_gpu", lambda: False)
    assert not specs.uses_transformer_engine(Layers.AUTO)
    with pytest.raises(ConfigError, match="this process sees no GPU; use `auto` or `local`"):
        specs.uses_transformer_engine(Layers.TRANSFORMER_ENGINE)
