"""A session makes the buffers of overlapped tensor parallelism for its rows, before it builds layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_deepstack.config.choices import OptIn, Precision
from megatron_deepstack.config.schema import ParallelConfig, Recipe, SpeedConfig
from megatron_deepstack.training import session


class Stopped(Exception):
    """Raised where layers would be built."""


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_buffers_come_before_layers(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    asked: list[Any] = []

    def build(*_: Any, **__: Any) -> None:
        asked.append("layers")
        raise Stopped

    monkeypatch.setattr(session, "make_user_buffers", lambda *sizes, fp8: asked.append((*sizes, fp8)))
    monkeypatch.setattr(session, "build_model", build)
    monkeypatch.setattr(session, "phase", _Phase)
    parallel = ParallelConfig(tensor=2, sequence_parallel=True, context=2)
    recipe = replace(Recipe(), parallel=parallel, speed=SpeedConfig(tp_overlap=OptIn.ALWAYS))
    recipe = replace(recipe, train=replace(recipe.train, seq_length=4096, micro_batch_size=2, precision=precision))
    with pytest.raises(Stopped):
        session.start_session(recipe, groups=None, beginning=object())  # type: ignore[arg-type]
    width = recipe.model.language.hidden_size
    assert asked == [(4096, width, 2, precision is Precision.FP8), "layers"]


class _Phase:
    """`phase` without other ranks."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
