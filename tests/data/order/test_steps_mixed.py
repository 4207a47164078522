"""Steps of views of any size: each rank reads the views that it encodes, one after another, and no others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.config.choices import Batching, Unreadable
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.data.order.mixture import Mixture
from megatron_deepstack.data.order.prefetch import Prefetcher
from megatron_deepstack.data.order.steps import LoadedStep, Share, StepReader
from megatron_deepstack.data.order.stored_shapes import shapes_of_step
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import BLOCK_BYTES, shard_path
from megatron_deepstack.errors import StoreError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX
from megatron_deepstack.planning.budget.cost import EncoderWork
from megatron_deepstack.planning.budget.load import step_load
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.tiny import tiny_qwen3_vl
from megatron_deepstack.testing.tiny_mixed import PATCH_SIZE, SAMPLES, SHAPES, tiny_view, write_tiny_mixed


def model() -> ModelConfig:
    tiny = tiny_qwen3_vl()
    return replace(tiny, vision=replace(tiny.vision, patch_size=PATCH_SIZE))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_mixed(tmp_path / "store")


def reader(store: object, batching: Batching, rank: int, pipeline: int, unreadable: Unreadable) -> StepReader:
    train = TrainConfig(global_batch_size=9, micro_batch_size=1, seq_length=512, batching=batching)
    share = Share(dp=0, num_replicas=1, replica_rank=rank)
    return StepReader(store, model(), ParallelConfig(pipeline=pipeline), train, share, unreadable)  # type: ignore[arg-type]


def loaded(store: object, batching: Batching = Batching.PADDED, rank: int = 0, pipeline: int = 1) -> LoadedStep:
    return reader(store, batching, rank, pipeline, Unreadable.STOP).load_samples(0, np.arange(9))


def images_of(step: LoadedStep) -> list[int]:
    """The image of each unit, by the samples in its row."""
    found = []
    for unit in step.plan.routes.units:
        members = step.members[unit.micro_batch][unit.sample]
        found.append([image for member in members for image in SAMPLES[member]][unit.image])
    return found


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_ranks_read_every_view_once(root: Path, batching: Batching, pipeline: int) -> None:
    store, seen = Store.open(root), []
    for rank in range(pipeline):
        step = loaded(store, batching, rank, pipeline)
        images = images_of(step)
        expected = [tiny_view(0, image, SHAPES[image]).reshape(-1) for image in images]  # type: ignore[arg-type]
        np.testing.assert_array_equal(step.pixels, np.concatenate([np.empty(0, np.uint8), *expected]))
        seen += images
    assert sorted(seen) == sorted(image for images in SAMPLES for image in images)


def test_grids_say_sizes_and_what_moves(root: Path) -> None:
    step = loaded(Store.open(root))
    shapes = [SHAPES[image] for image in images_of(step)]
    assert sum(3 * frames * height * width for frames, height, width in shapes) == step.pixels.size  # type: ignore[misc]
    store = Store.open(root)
    assert store.grid(2) == ViewGrid(1, 6, 4, moving=True)
    assert store.grid(0) == ViewGrid(1, 2, 4)


def test_tokens_are_counted_by_grid(root: Path) -> None:
    store = Store.open(root)
    assert loaded(store).num_tokens == expanded_lengths(store, model()).sum()


def damage(root: Path) -> None:
    """Change a byte of image 5."""
    path = root / shard_path(1, 2)
    data = bytearray(path.read_bytes())
    data[3 * BLOCK_BYTES] ^= 1
    path.write_bytes(data)


def test_a_damaged_view_stops_or_is_left_out(root: Path) -> None:
    damage(root)
    store = Store.open(root)
    with pytest.raises(StoreError, match=r"^step 1, sample 'mixed-4' \(number 4\): .*block 2 of image 5 .* is damaged"):
        loaded(store)
    step = reader(store, Batching.PADDED, 0, 1, Unreadable.SKIP).load_samples(0, np.arange(9))
    assert [(one.index, one.id) for one in step.unreadable] == [(4, "mixed-4")]
    place = images_of(step).index(5)
    before = sum(int(np.prod(SHAPES[image])) * 3 for image in images_of(step)[:place])  # type: ignore[arg-type]
    after = before + 320 * 256 * 3
    assert not step.pixels[before:after].any()
    assert step.pixels.any()


def test_a_mixture_reads_from_each_store(tmp_path: Path) -> None:
    stores = [
        Store.open(write_tiny_mixed(tmp_path / str(seed), seed=seed, name=f"s{seed}", images_per_part=2 + seed))
        for seed in range(2)
    ]
    mixture = Mixture(stores, None)
    images = [5, 8 + 5, 0, 8, 8 + 2, 2]
    expected = [tiny_view(image // 8, image % 8, SHAPES[image % 8]).reshape(-1) for image in images]  # type: ignore[arg-type]
    np.testing.assert_array_equal(mixture.read_flat(images), np.concatenate(expected))
    step = loaded(mixture, Batching.PACKED)
    assert step.num_images == sum(map(len, SAMPLES))


@pytest.mark.parametrize("mixed", [False, True], ids=["store", "mixture"])
def test_sizes_for_estimates_are_those_of_the_step(tmp_path: Path, mixed: bool) -> None:
    stores = [
        Store.open(write_tiny_mixed(tmp_path / str(seed), seed=seed, name=f"s{seed}")) for seed in range(1 + mixed)
    ]
    source = Mixture(stores, None) if mixed else stores[0]
    one = reader(source, Batching.PACKED, 0, 1, Unreadable.STOP)
    shapes, step = shapes_of_step(one, 0), one.load_samples(0, source.batch(one.train.seed, 0, 9))
    assert shapes.views is not None
    assert shapes.targets is not None
    grids = step.plan.routes.grids
    sides = zip(shapes.views.frames, shapes.views.height, shapes.views.width, strict=True)
    assert sorted(sides) == sorted((grid.frames, grid.height, grid.width) for grid in grids)
    load = step_load(replace(Recipe(), model=model(), train=one.train), shapes, 1)
    assert load.total_work == EncoderWork.of_grids(model(), grids)
    assert load.tokens == step.num_tokens
    assert shapes.targets.sum() == sum(int((labels != IGNORE_INDEX).sum()) for labels in step.plan.labels)


def test_steps_are_prepared_ahead_and_are_the_same_each_time(root: Path) -> None:
    one = reader(Store.open(root), Batching.PACKED, 0, 1, Unreadable.STOP)
    first, again = list(Prefetcher(one, 0, 3)), list(Prefetcher(one, 0, 3))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
