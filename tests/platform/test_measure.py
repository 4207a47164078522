"""Where the host waited, out of torch's warnings, and what else a trial asks of the device."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_deepstack.platform.compute.measure import (
    cudnn_version,
    host_waits,
    release_memory,
    waits_in_warnings,
    whole_float32,
)


def _wait() -> None:
    warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", UserWarning, stacklevel=1)


def test_waits_are_counted_by_place_however_often_a_line_warns() -> None:
    def action() -> None:
        for _ in range(3):
            _wait()

    found = waits_in_warnings(action)
    ((place, count),) = found.items()
    assert count == 3
    assert "test_measure.py" in place
    assert place.endswith("_wait")


def test_other_warnings_stay_what_they_are() -> None:
    def action() -> None:
        warnings.warn("something else", RuntimeWarning, stacklevel=1)

    with pytest.warns(RuntimeWarning, match="something else"):
        assert not waits_in_warnings(action)


def test_ours_is_named_beside_the_innermost_place() -> None:
    """As where Megatron reads the device in a call of ours."""
    code = compile("def waits(action):\n    action()\n", "/x/megatron_deepstack/step/schedule.py", "exec")
    names: dict[str, object] = {}
    exec(code, names)
    waits = names["waits"]
    ((place, _),) = waits_in_warnings(lambda: waits(_wait)).items()  # type: ignore[operator]
    assert place.split(" < ")[1] == "megatron_deepstack/step/schedule.py:2 waits"


def test_without_a_gpu_the_action_runs_and_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_deepstack.platform.compute.measure.has_gpu", lambda: False)
    done: list[int] = []
    assert not host_waits(lambda: done.append(1))
    assert done == [1]
    release_memory()
    assert cudnn_version() >= 0


def test_tf32_is_off_within_and_as_before_after() -> None:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    with whole_float32():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
