"""The buffers of overlapped tensor parallelism, as versions of Transformer Engine are asked for them."""

from __future__ import annotations

import importlib
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.compute.user_buffers import make_user_buffers


class Modes(Enum):
    """As Transformer Engine's since 2.7."""

    NONE = "none"
    FP8 = "fp8"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("modes", [Modes, None], ids=["2.7", "before"])
def test_what_the_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch, modes: Any, fp8: bool) -> None:
    asked: list[dict[str, Any]] = []
    base = SimpleNamespace(initialize_ub=lambda **kwargs: asked.append(kwargs))
    if modes is not None:
        base.UserBufferQuantizationMode = modes
    monkeypatch.setattr(importlib, "import_module", lambda name: {"transformer_engine.pytorch.module.base": base}[name])
    make_user_buffers(4096, 256, 2, fp8=fp8)
    kind = {"use_fp8": fp8} if modes is None else {"quantization_modes": [Modes.FP8 if fp8 else Modes.NONE]}
    assert asked == [{"shape": [4096, 256], "tp_size": 2, "bootstrap_backend": "nccl", **kind}]


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("CUDA device does not support Multicast.\nLaunch app with UB_SKIPMC=1.")

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(initialize_ub=refuse))
    with pytest.raises(ConfigError, match=r"speed.tp_overlap: .* its buffers: CUDA .* UB_SKIPMC=1; or set speed"):
        make_user_buffers(4096, 256, 2, fp8=False)
