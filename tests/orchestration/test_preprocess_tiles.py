"""Stores of padded tiles, as Granite 4 Vision takes them: pixels and placeholders of the published processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.architectures import VISION
from megatron_deepstack.config.choices import ImageResize, Template
from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.config.sizes import resampled_side
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.processor import check_store
from megatron_deepstack.data.images.processors import described_processor, processor_of
from megatron_deepstack.data.images.tile_processor import TileProcessor
from megatron_deepstack.data.order.steps import planned_sample
from megatron_deepstack.data.store.lengths import expanded_lengths, sample_sizes
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, StoreError
from megatron_deepstack.inference.ask.preparation import Asked, Preparation
from megatron_deepstack.planning.exchange.image_plan import image_plan
from megatron_deepstack.planning.exchange.rows import context_length, image_rows
from megatron_deepstack.planning.views import TileGrid, read_tile_grids, tile_grid
from megatron_deepstack.storekeeping.choose import load
from megatron_deepstack.storekeeping.show import page
from megatron_deepstack.storekeeping.stats import statistics
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny import tiny_granite
from megatron_deepstack.testing.tiny_chat import GRANITE_4_CONFIG, GRANITE_4_TOKENS, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import jpeg_bytes, record, write_records
from orchestration.preprocess.driver.run import preprocess

SIZES = [(90, 60), (40, 300), (64, 48), (17, 23), (33, 33), (300, 9), (1, 1), (16, 16), (3, 200)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "photos").mkdir()
    names = [f"{width}x{height}.jpg" for width, height in SIZES]
    for seed, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        (folder / "photos" / name).write_bytes(jpeg_bytes(*size, seed=seed))
    records = [record(f"r{number}", [name]) for number, name in enumerate(names)]
    write_records(folder / "records.json", [*records, record("three", names[:3]), record("text", [])])
    write_chat_tokenizer(folder / "tokenizer", GRANITE_4_TOKENS, GRANITE_4_CONFIG)
    model = tiny_granite()
    return Recipe(
        model=replace(model, language=replace(model.language, vocab_size=512)),
        data=DataConfig(
            records=(str(folder / "records.json"),),
            images=str(folder / "photos"),
            tokenizer=str(folder / "tokenizer"),
            template=Template.GRANITE_4,
            store=str(folder / "store.zarr"),
            images_per_part=3,
        ),
    )


@pytest.fixture(scope="module")
def store(recipe: Recipe) -> Store:
    preprocess(recipe, str(recipe.data.store), workers=0)
    return Store.open(str(recipe.data.store))


def published_views(picture: Image.Image, recipe: Recipe) -> np.ndarray:
    """uint8 (views, S, S, 3) of transformers' own processor that uses Pillow."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side, grids = recipe.model.vision.image_size, read_tile_grids(recipe.model.vision.tile_grids)
    processor = LlavaNextImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in grids],
        do_rescale=False,
        do_normalize=False,
    )
    found = processor([picture], return_tensors="np")["pixel_values"][0]
    return np.asarray(found).transpose(0, 2, 3, 1).astype(np.uint8)


def test_the_store_holds_the_published_views(recipe: Recipe, store: Store) -> None:
    for number, size in enumerate(SIZES):
        image = store.image(number)
        photo = Image.open(Path(str(recipe.data.images)) / image.path)
        np.testing.assert_array_equal(
            store.read_views(number, range(image.count)), published_views(photo, recipe), err_msg=image.path
        )
        assert isinstance(image.grid, TileGrid)
        assert (image.grid.image_width, image.grid.image_height) == size
    assert not verify(str(recipe.data.store), processes=1)
    assert described_processor(store.attributes.processor) == processor_of(recipe)


def test_placeholders_are_as_many_as_the_published_ones(recipe: Recipe, store: Store) -> None:
    """Lengths from index arrays alone, from the plan of a sample, and from transformers' arithmetic, agree."""
    lengths = expanded_lengths(store, recipe.model)
    sizes = sample_sizes(store, recipe.model, np.arange(len(store)))
    np.testing.assert_array_equal(lengths, sizes.lengths)
    for number in range(len(store)):
        sample = store.sample(number)
        expected = [published_tokens(*store.image(image).size, recipe) for image in sample.images]
        planned = planned_sample(store, recipe.model, recipe.train, number)
        assert [span.length for span in planned.sequence.spans] == expected
        assert sizes.visual[number] == sum(expected)
        assert lengths[number] == planned.sequence.length == len(sample.tokens) + sum(expected) - len(expected)
        plans = [image_plan(recipe.model, shape, 1 << 30) for shape in planned.grids]
        assert sizes.units[number] == sum(len(plan.units) for plan in plans)


def published_tokens(width: int, height: int, recipe: Recipe) -> int:
    from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor

    vision, qformer = recipe.model.vision, recipe.model.qformer
    side = vision.image_size
    processor: Any = Granite4VisionProcessor.__new__(Granite4VisionProcessor)
    grids = read_tile_grids(vision.tile_grids)
    pinpoints = [[rows * side, columns * side] for columns, rows in grids]
    processor.image_processor = type("Images", (), {"image_grid_pinpoints": pinpoints})
    processor.patch_size, processor.num_additional_image_tokens = vision.patch_size, 0
    processor.downsample_rate = f"{qformer.query_side}/{qformer.window_side}"
    return int(processor._get_number_of_features(height, width, side, side))


def test_a_thousand_sizes_under_the_published_grids(recipe: Recipe) -> None:
    """Positions of an image in the named size, which are also those of the rows that the routes plan."""
    vision = VISION["granite4_vision_3b"]
    model = replace(recipe.model, vision=vision, qformer=type(recipe.model.qformer)())
    whole, rng = replace(recipe, model=model), np.random.default_rng(0)
    grids = read_tile_grids(vision.tile_grids)
    assert (len(grids), max(columns * rows for columns, rows in grids), resampled_side(model)) == (27, 10, 12)
    for number in range(1000):
        width, height = (int(10 ** rng.uniform(0, 3.7)) for _ in range(2))
        shape = tile_grid(width, height, vision.image_size, grids)
        assert context_length(model, shape) == published_tokens(width, height, whole)
        if number % 100 == 0:
            assert context_length(model, shape) == image_rows(model, shape).context_length


def test_a_question_has_the_pixels_and_the_prompt_of_the_store(recipe: Recipe, store: Store) -> None:
    tokenizer = load_tokenizer(str(recipe.data.tokenizer))
    preparation = Preparation.of_run(recipe, tokenizer, pytest.fail)
    paths = [str(Path(str(recipe.data.images)) / store.image(number).path) for number in range(3)]
    prepared = preparation.prepare(Asked("What is it?", tuple(paths)))
    views = preparation.views([prepared])
    for number in range(3):
        count = store.image(number).count
        np.testing.assert_array_equal(views.read_views(number, range(count)), store.read_views(number, range(count)))
        assert views.image(number).grid == store.grid(number)
    sample = store.sample(len(SIZES))
    first = int(np.flatnonzero(sample.loss_mask)[0])
    np.testing.assert_array_equal(prepared.prompt, sample.tokens[:first])


def test_the_page_and_the_statistics(recipe: Recipe, store: Store) -> None:
    opened, guessed = load(str(recipe.data.store), None)
    assert "3 x 1 tiles" in page(opened, guessed, range(len(opened)), None)
    known = page(opened, recipe.model, [0], None)
    assert "stack 1, from the output of ViT layer 2, added before layer 0" in known
    assert "2 x 2 tiles; 2 lines of 4 tokens and a newline are used, 14 in all" in known
    titles = {one.title: sum(count for _, count in one.bins) for one in statistics(store, recipe.model).histograms}
    assert titles["grid, columns x rows"] == len(SIZES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile_grids": ("1x1",)}, "model.vision.tile_grids is 1x1, it was made with 1x1, 2x1"),
        ({"image_size": 32}, "model.vision.image_size is 32, it was made with 16"),
    ],
)
def test_another_model_does_not_fit(recipe: Recipe, store: Store, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StoreError, match=words):
        check_store(store, replace(recipe.model, vision=replace(recipe.model.vision, **changes)))


def test_a_store_of_crops_does_not_fit(recipe: Recipe, serial: Path) -> None:
    with pytest.raises(StoreError, match=r"model.variant 'granite4_vision' needs the views 'tiles', it holds 'crops'"):
        check_store(Store.open(serial), recipe.model)


def test_without_grids_there_is_no_tile() -> None:
    with pytest.raises(ConfigError, match=r"model.vision.tile_grids is empty"):
        tile_grid(3, 4, 16, ())


def test_the_description_is_plain_values(recipe: Recipe) -> None:
    processor = processor_of(recipe)
    assert isinstance(processor, TileProcessor)
    made = processor.describe()
    assert made["layout"] == ViewLayout.TILES
    assert made["resize"] == ImageResize.PILLOW
    assert all(isinstance(value, int | str | list) for value in made.values())
