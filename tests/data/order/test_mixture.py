"""Mixtures: exact shares, every store in epochs of its own, an order that knows neither layout nor history."""

from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.config.schema import DataConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.data.order.mixture import Mixture
from megatron_deepstack.data.order.opening import open_training_reader
from megatron_deepstack.data.order.sampler import merged_streams
from megatron_deepstack.data.order.steps import Share
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.writer import write_attributes
from megatron_deepstack.errors import ConfigError, DataError, StoreError
from megatron_deepstack.testing.tiny import tiny_model
from megatron_deepstack.testing.tiny_store import write_tiny_store

WEIGHTS = [[1, 1], [1, 2, 5], [0.001, 3.7], [1e-4, 1, 1], [3], [0.3333333, 0.6666667, 1e-9, 5], list(range(1, 40))]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_exact_over_time(weights: list[float]) -> None:
    stores, numbers = merged_streams(weights, 0, 20_000)
    positions = np.arange(1, 20_001)
    for store, weight in enumerate(weights):
        mine = stores == store
        wanted = weight / sum(weights) * positions
        assert np.abs(np.cumsum(mine) - wanted).max() < 1  # measured worst: 0.95
        assert numbers[mine].tolist() == list(range(mine.sum())), "no sample of a stream is left out or repeated"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("first", [0, 1, 99, 12_345])
def test_any_stretch_is_a_piece_of_the_whole(weights: list[float], first: int) -> None:
    whole, piece = merged_streams(weights, 0, 13_000), merged_streams(weights, first, first + 300)
    for long, short in zip(whole, piece, strict=True):
        np.testing.assert_array_equal(short, long[first : first + 300])


def test_far_positions_cost_nothing() -> None:
    stores, numbers = merged_streams([1, 2, 5], 8 * 10**10, 8 * 10**10 + 8)
    assert np.bincount(stores).tolist() == [1, 2, 5]
    assert numbers[stores == 2].tolist() == list(range(5 * 10**10, 5 * 10**10 + 5))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("stores")
    small = write_tiny_store(root / "small", samples=((0,), (), (1,), (2, 4)), seed=1, name="small")
    return str(small), str(write_tiny_store(root / "large", seed=2, name="large"))


@pytest.fixture
def mixture(paths: tuple[str, str]) -> Mixture:
    return Mixture([Store.open(path) for path in paths], [3, 1])


def test_samples_and_images_are_the_stores_own(mixture: Mixture) -> None:
    small, large = mixture.stores
    assert len(mixture) == len(small) + len(large) == 16
    for index in range(16):
        store, number = (small, index) if index < 4 else (large, index - 4)
        ours, theirs = mixture.sample(index), store.sample(number)
        assert (ours.id, ours.tokens.tolist()) == (theirs.id, theirs.tokens.tolist())
        for mine, other in zip(ours.images, theirs.images, strict=True):
            assert mixture.image(mine) == store.image(other)
            np.testing.assert_array_equal(mixture.read_many([(mine, [0, 1])]), store.read_views(other, [0, 1]))
    for index in (-1, 16):
        with pytest.raises(IndexError, match=r"mixture of .*small, .*large: sample"):
            mixture.sample(index)


def test_one_call_reads_from_all_stores(mixture: Mixture) -> None:
    requests = [(9 + 6, [0, 1]), (0, [4, 0]), (9 + 0, [1]), (2, []), (1, [2])]
    expected = np.concatenate([mixture.read_many([request]) for request in requests])
    np.testing.assert_array_equal(mixture.read_many(requests), expected)


def drawn(mixture: Mixture, steps: int, size: int, seed: int = 7) -> np.ndarray:
    return np.concatenate([mixture.batch(seed, step, size) for step in range(steps)])


def test_each_store_comes_in_epochs_of_its_own(mixture: Mixture) -> None:
    order = drawn(mixture, 16, 8)
    small, large = order[order < 4], order[order >= 4]
    assert (len(small), len(large)) == (96, 32)
    for drawn_so_far in range(6, 97, 6):
        counts = np.bincount(small[:drawn_so_far], minlength=4)
        assert counts.max() - counts.min() <= 1, "no sample comes again before all others have"
    epochs = [tuple(large[first : first + 12]) for first in (0, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(4, 16))
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_each_step_has_its_share_of_both_stores_in_any_order(mixture: Mixture) -> None:
    seen = set()
    for step in range(12):
        batch = mixture.batch(7, step, 8)
        assert (batch < 4).sum() == 6
        seen |= {(place < 4, int(one) < 4) for place, one in enumerate(batch)}
    assert len(seen) == 4


def test_the_order_depends_on_seed_and_position_alone(mixture: Mixture, paths: tuple[str, str]) -> None:
    whole = drawn(mixture, 10, 8)
    assert (drawn(mixture, 10, 8, seed=8) != whole).any()
    fresh = Mixture([Store.open(path) for path in paths], [0.75, 0.25])
    np.testing.assert_array_equal(np.concatenate([fresh.batch(7, step, 8) for step in range(6, 10)]), whole[48:])


def test_without_weights_shares_are_sizes(paths: tuple[str, str]) -> None:
    order = drawn(Mixture([Store.open(path) for path in paths], None), 4, 16)
    assert np.bincount(order).tolist() == [4] * 16


def test_identity(paths: tuple[str, str]) -> None:
    stores = [Store.open(path) for path in paths]
    plain = Mixture(stores, [3, 1])
    assert plain.plan_hash == Mixture(stores, [6, 2]).plan_hash
    others = [Mixture(stores, [1, 1]), Mixture(stores[::-1], [3, 1]), Mixture(stores[:1], [1])]
    assert len({plain.plan_hash, *(other.plan_hash for other in others), stores[0].plan_hash}) == 5
    assert plain.tokenizer_sha256 == stores[0].tokenizer_sha256


def test_other_tokenizers_are_refused(paths: tuple[str, str], tmp_path: Path) -> None:
    other = write_tiny_store(tmp_path / "other")
    attributes = Store.open(other).attributes
    fields = {name: getattr(attributes, name) for name in attributes.__dataclass_fields__}
    write_attributes(other, {**fields, "tokenizer": {**attributes.tokenizer, "sha256": "2" * 64}})
    with pytest.raises(StoreError, match=r"small was made with tokenizer 111.*other with 222.*preprocess one of them"):
        Mixture([Store.open(paths[0]), Store.open(other)], None)


def recipe(paths: tuple[str, ...], seq_length: int = 256, **data: object) -> Recipe:
    train = TrainConfig(global_batch_size=8, micro_batch_size=2, seq_length=seq_length)
    return Recipe(model=tiny_model(), train=train, data=DataConfig(stores=paths, **data))  # type: ignore[arg-type]


def test_a_reader_of_a_mixture(paths: tuple[str, str]) -> None:
    asked = recipe(paths, weights=(3.0, 1.0))
    alone = open_training_reader(asked, Share(dp=0, num_replicas=1, replica_rank=0))
    halves = [open_training_reader(asked, Share(dp=dp, num_replicas=2, replica_rank=0)) for dp in range(2)]
    for step in range(3):
        together = alone.load(step)
        loaded = [half.load(step) for half in halves]
        assert all(np.array_equal(one.samples, together.samples) for one in loaded)
        members = [index for one in loaded for batch in one.members for row in batch for index in row]
        assert sorted(members) == sorted(together.samples)
        assert len(together.pixels) == sum(len(unit.views) for unit in together.plan.routes.units)
    assert asked.parallel == ParallelConfig()


def test_every_store_is_checked(paths: tuple[str, str], tmp_path: Path) -> None:
    share = Share(dp=0, num_replicas=1, replica_rank=0)
    with pytest.raises(DataError, match=r"large: \d+ of 12 samples exceed train.seq_length 30"):
        open_training_reader(recipe(paths[::-1], seq_length=30), share)
    empty = str(write_tiny_store(tmp_path / "empty", samples=()))
    with pytest.raises(DataError, match="empty: the store holds no samples"):
        open_training_reader(recipe((paths[0], empty)), share)
    with pytest.raises(StoreError, match="gone: no such folder"):
        open_training_reader(recipe((paths[0], str(tmp_path / "gone"))), share)
    with pytest.raises(ConfigError, match=r"data\.store: not set"):
        open_training_reader(Recipe(), share)
