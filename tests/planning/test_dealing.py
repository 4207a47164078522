"""Dealing a global batch: the same samples for any number of replicas, equal counts, and nearly equal work."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.config.choices import Batching
from megatron_deepstack.config.schema import LanguageConfig, ParallelConfig, TrainConfig
from megatron_deepstack.planning.batch.dealing import Deal, deal, deal_evenly
from megatron_deepstack.planning.budget.cost import decoder_flops

LANGUAGE = LanguageConfig()


def dealt(
    num_replicas: int, batching: Batching, parallel: ParallelConfig | None = None, micro_batch_size: int = 1
) -> tuple[Deal, np.ndarray, np.ndarray]:
    """A batch of 128 samples of 20 to 4,000 tokens, with none to five units each."""
    random = np.random.default_rng(3)
    lengths = np.clip(np.exp(random.normal(6.5, 0.7, 128)), 20, 4000).astype(np.int64)
    units = random.integers(0, 6, 128)
    train = TrainConfig(global_batch_size=128, micro_batch_size=micro_batch_size, seq_length=4096, batching=batching)
    return deal(lengths, units, LANGUAGE, parallel or ParallelConfig(), train, num_replicas), lengths, units


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
def test_all_samples_once_and_work_is_even(batching: Batching, num_replicas: int) -> None:
    found, lengths, units = dealt(num_replicas, batching)
    seen = [one for mine in found.replicas for batch in mine for row in batch for one in row]
    assert sorted(seen) == list(range(128))
    assert len({len(mine) for mine in found.replicas}) == 1
    mine = [[one for batch in replica for row in batch for one in row] for replica in found.replicas]
    work = [decoder_flops(LANGUAGE, lengths[one].astype(float)).sum() for one in mine]
    assert max(work) <= (1 + found.balance.imbalance) * np.mean(work) * 1.0001
    assert found.balance.imbalance < 0.02
    if num_replicas > 1:
        encoder = [units[one].sum() for one in mine]
        assert max(encoder) <= 1.3 * np.mean(encoder)


@pytest.mark.parametrize("batching", Batching)
def test_interleaving_gets_whole_rounds(batching: Batching) -> None:
    found, _, _ = dealt(2, batching, ParallelConfig(pipeline=4, virtual_pipeline=2))
    assert [len(mine) % 4 for mine in found.replicas] == [0, 0]


def test_samples_of_like_length_share_a_micro_batch() -> None:
    found, lengths, _ = dealt(2, Batching.PADDED, micro_batch_size=4)
    spread = [np.ptp(lengths[[row[0] for row in batch]]) for mine in found.replicas for batch in mine]
    assert np.median(spread) < 100
    common, _, _ = dealt(2, Batching.PADDED, ParallelConfig(pipeline=2, virtual_pipeline=2), micro_batch_size=4)
    assert found.balance.padding < 0.1 < common.balance.padding


def test_the_second_cost_decides_between_equal_first_ones() -> None:
    chosen = deal_evenly(np.full(8, 10.0), np.array([9.0, 1, 1, 1, 1, 1, 1, 1]), 2)
    assert sorted(len(mine) for mine in chosen) == [4, 4]
    (heavy,) = [mine for mine in chosen if 0 in mine]
    assert len(heavy) == 4
    costs = np.array([5.0, 4, 3, 2])
    assert sorted(sorted(mine) for mine in deal_evenly(costs, np.zeros(4), 2)) == [[0, 3], [1, 2]]
