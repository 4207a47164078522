"""Steps: what a rank reads of a batch, samples that cannot be read, and the thread that reads ahead."""

import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.config.choices import Batching, Unreadable
from megatron_deepstack.config.schema import ParallelConfig, TrainConfig
from megatron_deepstack.data.order.prefetch import Prefetcher
from megatron_deepstack.data.order.steps import LoadedStep, Share, StepReader, planned_sample
from megatron_deepstack.data.order.unreadable import without
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import shard_path
from megatron_deepstack.errors import CacheError, StoreError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.testing.tiny import tiny_model
from megatron_deepstack.testing.tiny_store import SAMPLES, write_tiny_store

MODEL = tiny_model()
BAD_IMAGE = 2
"""Of sample 2, its second, and of sample 10, its first."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_store(tmp_path / "store")


def damage(root: Path) -> None:
    """Flip a byte in the last view of the image."""
    image = Store.open(root).image(BAD_IMAGE)
    path = root / shard_path(0)
    data = bytearray(path.read_bytes())
    data[(image.start + image.count - 1) * 16 * 16 * 3 + 5] ^= 0x40
    path.write_bytes(data)


def reader(
    root: Path, unreadable: Unreadable, batching: Batching = Batching.PADDED, replica_rank: int = 0, pipeline: int = 1
) -> StepReader:
    size = 1 if batching is Batching.PACKED else 3
    train = TrainConfig(global_batch_size=12, micro_batch_size=size, seq_length=256, batching=batching)
    share = Share(dp=0, num_replicas=1, replica_rank=replica_rank)
    return StepReader(Store.open(root), MODEL, ParallelConfig(pipeline=pipeline), train, share, unreadable)


def everything(reader: StepReader) -> LoadedStep:
    """All samples of the store, in order."""
    return reader.load_samples(4, np.arange(12))


def targets(loaded: LoadedStep) -> int:
    return sum(int((labels != IGNORE_INDEX).sum()) for labels in loaded.plan.labels)


def test_under_stop_the_error_names_step_sample_image_and_store(root: Path) -> None:
    everything(reader(root, Unreadable.STOP))
    damage(root)
    with pytest.raises(StoreError, match=r"^step 5, sample 'tiny-2' \(number 2\): .*view 3 of image 2 .*store") as met:
        everything(reader(root, Unreadable.STOP))
    assert "crc32c" in str(met.value)


@pytest.mark.parametrize("batching", Batching)
def test_under_skip_the_rank_that_reads_says_which_and_goes_on(root: Path, batching: Batching) -> None:
    whole = everything(reader(root, Unreadable.SKIP, batching))
    assert whole.unreadable == ()
    damage(root)
    loaded = everything(reader(root, Unreadable.SKIP, batching))
    assert sorted(sample.index for sample in loaded.unreadable) == [2, 10]
    for sample in loaded.unreadable:
        assert (loaded.index(sample.where), sample.id) == (sample.index, f"tiny-{sample.index}")
        assert "is damaged: its crc32c" in sample.reason
    changed = [k for k, view in enumerate(loaded.pixels) if (view != whole.pixels[k]).any()]
    assert len(changed) == 2, "the bad view of two samples"
    assert not loaded.pixels[changed].any()
    np.testing.assert_array_equal(loaded.plan.labels[0], whole.plan.labels[0])


@pytest.mark.parametrize("unreadable", Unreadable)
def test_no_sample_is_left_out_for_a_fault_of_the_machine(
    root: Path, unreadable: Unreadable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of copies that is full says nothing about a sample."""

    def full(*_: object) -> None:
        raise CacheError("no space for copies")

    monkeypatch.setattr(Store, "read_many", full)
    with pytest.raises(CacheError, match=r"^no space for copies$"):
        everything(reader(root, unreadable))


def counted(step: LoadedStep) -> int:
    """Targets as the loss that balances experts weighs samples by them."""
    return sum(member.num_targets for batch in step.plan.members for member in batch)


@pytest.mark.parametrize("batching", Batching)
def test_without_them_their_targets_are_gone_and_nothing_else(root: Path, batching: Batching) -> None:
    damage(root)
    read = reader(root, Unreadable.SKIP, batching)
    loaded = everything(read)
    left = loaded.without([sample.where for sample in loaded.unreadable])
    lost = [planned_sample(read.store, MODEL, read.train, index) for index in (2, 10)]
    num_lost = sum(int((sample.sequence.labels != IGNORE_INDEX).sum()) for sample in lost)
    assert targets(loaded) - targets(left) == num_lost > 0
    assert [counted(step) for step in (loaded, left)] == [targets(step) for step in (loaded, left)]
    for before, after in zip(loaded.plan.labels, left.plan.labels, strict=True):
        assert ((after == before) | (after == IGNORE_INDEX)).all()
    for name in ("seq_lengths", "tokens", "segments", "routes"):
        assert getattr(left.plan, name) is getattr(loaded.plan, name)
    others = [
        where
        for m, rows in enumerate(loaded.members)
        for row, ones in enumerate(rows)
        for where in [(m, row, k) for k in range(len(ones))]
        if loaded.index(where) not in (2, 10)
    ]
    assert targets(left.without(others)) == counted(left.without(others)) == 0


def test_ranks_that_know_the_same_places_have_the_same_plan(root: Path) -> None:
    damage(root)
    steps = [everything(reader(root, Unreadable.SKIP, Batching.PADDED, rank, 2)) for rank in range(2)]
    found = [sample.where for step in steps for sample in step.unreadable]
    assert {steps[0].index(where) for where in found} == {2, 10}
    plans = [without(step.plan, found) for step in steps]
    for one, other in zip(plans[0].labels, plans[1].labels, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_missing_shard_takes_out_all_its_samples(root: Path) -> None:
    (root / shard_path(1)).unlink()
    loaded = everything(reader(root, Unreadable.SKIP))
    assert sorted(sample.index for sample in loaded.unreadable) == [
        number for number, images in enumerate(SAMPLES) if set(images) & {4, 5, 6, 7}
    ]


def test_lengths_from_the_index_are_those_of_the_samples(root: Path) -> None:
    store = Store.open(root)
    train = TrainConfig(seq_length=256)
    expected = [planned_sample(store, MODEL, train, index).sequence.length for index in range(len(store))]
    assert expanded_lengths(store, MODEL).tolist() == expected
    text_only = Store.open(write_tiny_store(root.parent / "text", grids=(), samples=((), ())))
    assert expanded_lengths(text_only, MODEL).tolist() == text_only.lengths().tolist()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetching_gives_the_same_steps_and_its_thread_ends(root: Path) -> None:
    read = reader(root, Unreadable.STOP)
    for step, loaded in enumerate(Prefetcher(read, 0, 3)):
        assert prefetch_threads()
        again = read.load(step)
        np.testing.assert_array_equal(loaded.samples, again.samples)
        np.testing.assert_array_equal(loaded.pixels, again.pixels)
    assert not prefetch_threads()
    assert list(Prefetcher(read, 3, 3)) == []


def test_its_thread_ends_when_training_stops_early(root: Path) -> None:
    steps = iter(Prefetcher(reader(root, Unreadable.STOP), 0, 1000))
    next(steps)
    assert prefetch_threads()
    steps.close()  # type: ignore[attr-defined]
    assert not prefetch_threads()


def test_an_error_in_the_thread_surfaces_at_its_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reader(root, Unreadable.STOP)
    load = read.load

    def failing(step: int) -> LoadedStep:
        if step == 2:
            raise MemoryError("no room for pixels")
        return load(step)

    monkeypatch.setattr(read, "load", failing)
    seen = []
    with pytest.raises(MemoryError) as met:
        seen.extend(loaded.step for loaded in Prefetcher(read, 0, 5))
    assert seen == [0, 1]
    assert met.value.__notes__ == ["while the data of step 3 was prepared"]
    assert not prefetch_threads()
