"""When a run is called sick, and that a resumed run judges as one without interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_deepstack.config.schema import HealthConfig
from megatron_deepstack.errors import HealthError
from megatron_deepstack.training.guard.health import NO_TARGET, NOT_READ, Health, earlier_records, some

CONFIG = HealthConfig(max_skipped_steps=2, spike_factor=2.0, spike_window=6, max_unreadable_samples=3)


def fresh(config: HealthConfig = CONFIG) -> Health:
    return Health.of(config, ())


def ids_of(step: int) -> list[str]:
    return [f"sample-{step}-{n}" for n in range(2)]


def test_a_spike_stands_out_of_the_median() -> None:
    health = fresh()
    for loss in (1.0, 1.0, 9.0):
        assert not health.take(loss, applied=True, unreadable=0), "half of the window has not been seen yet"
    assert not health.take(2.0, applied=True, unreadable=0), "twice the median is the limit itself"
    assert health.take(3.1, applied=True, unreadable=0)


def test_a_window_forgets() -> None:
    """After six steps at a higher level that level is normal."""
    health = fresh()
    flags = [health.take(loss, applied=True, unreadable=0) for loss in (1.0,) * 6 + (5.0,) * 7]
    assert flags == [False] * 6 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("config", [HealthConfig(spike_factor=0), HealthConfig(spike_window=0)])
def test_spikes_can_be_left_unflagged(config: HealthConfig) -> None:
    health = fresh(config)
    assert not any(health.take(10.0**n, applied=True, unreadable=0) for n in range(200))


def test_skipped_steps_leave_no_trace_in_the_window() -> None:
    health = fresh()
    for _ in range(5):
        health.take(math.nan, applied=False, unreadable=0)
    assert not health.losses
    assert not health.take(1.0, applied=True, unreadable=0)
    assert health.skipped_in_row == 0


def test_too_many_skipped_steps_in_a_row() -> None:
    """More than the limit, listed with their samples; a good step between two rows starts the count anew."""
    health = fresh()
    for applied in (False, False, True, False, False):
        health.take(1.0 if applied else math.inf, applied, 0)
    health.require_well(5, ids_of)
    health.take(math.nan, applied=False, unreadable=0)
    with pytest.raises(HealthError, match=r"3 steps in a row.*max_skipped_steps allows 2") as caught:
        health.require_well(6, ids_of)
    for words in ("step 4: sample-3-0, sample-3-1", "step 5: sample-4-0", "step 6: sample-5-0"):
        assert words in str(caught.value)
    assert "step 3:" not in str(caught.value)


def test_steps_without_targets_count_and_the_advice_fits() -> None:
    health = fresh()
    for _ in range(3):
        assert not health.take(None, applied=False, unreadable=0, because=NO_TARGET)
    with pytest.raises(HealthError, match=r"3 steps in a row were left out .*all loss masks are zero") as caught:
        health.require_well(3, ids_of)
    assert "`megatron-deepstack store verify` finds what is damaged" in str(caught.value)
    assert "learning rate" not in str(caught.value)


def test_a_run_that_learned_nothing_is_no_success() -> None:
    """From its records a resumed run judges as one without interruption; one applied step is enough."""
    skipped = {"step": 1, "loss": None, "applied": False}
    Health.of(CONFIG, [{"step": 1, "loss": 1.0, "applied": True}, {**skipped, "step": 2}]).require_learned(2, ids_of)
    fresh().require_learned(0, ids_of)
    health = Health.of(CONFIG, [skipped])
    health.take(None, applied=False, unreadable=1, because=NOT_READ)
    with pytest.raises(HealthError, match=r"nothing was learned: all 2 steps .*no sample could be read") as caught:
        health.require_learned(2, ids_of)
    assert "step 2: sample-1-0, sample-1-1" in str(caught.value)
    health.take(1.0, applied=True, unreadable=0)
    health.require_learned(3, ids_of)


def test_too_many_unreadable_samples() -> None:
    health = fresh()
    health.take(1.0, applied=True, unreadable=3)
    health.require_well(1, ids_of)
    health.take(1.0, applied=True, unreadable=1)
    with pytest.raises(HealthError, match=r"4 samples could not be read.*allows 3"):
        health.require_well(2, ids_of)


def test_long_lists_are_cut() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some([str(n) for n in range(20)], 2) == "0, 1 and 18 more (see metrics.jsonl)"


@pytest.mark.parametrize("stop", range(1, 12))
def test_records_restore_it(tmp_path: Path, stop: int) -> None:
    """Whatever step a run stopped after: from its records it judges the rest as if it had not stopped."""
    course = [(1.0, True, 0), (1.2, True, 1), (math.nan, False, 0), (0.9, True, 0), (1.0, True, 0), (5.0, True, 0)]
    course += [(1.0, True, 0), (math.inf, False, 2), (math.nan, False, 0), (1.0, True, 0), (8.0, True, 0)]
    file = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"step": n + 1, "loss": loss, "applied": applied, "unreadable": unreadable})
        for n, (loss, applied, unreadable) in enumerate(course)
    ]
    file.write_text("\n".join(lines) + '\n{"step": 12, "lo')
    whole = fresh()
    flags = [whole.take(*step) for step in course]
    resumed = Health.of(CONFIG, earlier_records(file, stop))
    assert [resumed.take(*step) for step in course[stop:]] == flags[stop:]
    assert (resumed.skipped_in_row, resumed.unreadable) == (whole.skipped_in_row, whole.unreadable)
    assert list(resumed.losses) == list(whole.losses)


def test_a_run_without_records(tmp_path: Path) -> None:
    assert list(earlier_records(tmp_path / "metrics.jsonl", 5)) == []
