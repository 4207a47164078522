"""Views at an image's own resolution equal the published processor's, in size and in every value."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.choices import ImageResize
from megatron_deepstack.config.traits.variants import ViewLayout
from megatron_deepstack.data.images.decoder import Decoder, SharedImage
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.blocks import from_blocks
from megatron_deepstack.planning.views import MAX_ASPECT_RATIO

PROCESSOR = SizedProcessor(
    layout=ViewLayout.GLOBAL,
    patch_size=16,
    merge_size=2,
    min_pixels=64 * 64,
    max_pixels=256 * 256,
    resize=ImageResize.PILLOW,
    max_image_pixels=10**7,
)


def picture(width: int, height: int) -> bytes:
    generator = np.random.default_rng(width * 1000 + height)
    coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def patches_of(view: np.ndarray, merge: int = 2, side: int = 16) -> np.ndarray:
    """The view's patches in the published order and form, before normalisation: (patches, 3 * 2 * 16 * 16)."""
    rows, columns = view.shape[0] // side // merge, view.shape[1] // side // merge
    cut = view.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(cut[..., None, :, :], 2, axis=-3).reshape(rows * columns * merge * merge, -1)


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 480), (200, 150), (31, 33), (1, 1), (7, 900), (1900, 12), (256, 256), (64, 96), (300, 1000)],
)
def test_grid_and_pixel_values_are_the_published_ones(width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    data = picture(width, height)
    published = Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": PROCESSOR.min_pixels, "longest_edge": PROCESSOR.max_pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    theirs = published(Image.open(io.BytesIO(data)), return_tensors="np")
    ours = PROCESSOR.process(data)
    assert ours.grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert ours.size == (width, height)
    view = from_blocks(ours.slots, (ours.grid[1] * 16, ours.grid[2] * 16, 3))
    levels = np.rint((theirs["pixel_values"] * 0.5 + 0.5) * 255).astype(np.uint8)
    np.testing.assert_array_equal(patches_of(view), levels)


def test_torch_rounds_differently_by_at_most_two_levels() -> None:
    data = picture(500, 380)
    ours, other = (replace(PROCESSOR, resize=resize).process(data).slots.astype(int) for resize in ImageResize)
    assert np.abs(ours - other).max() <= 2


def test_a_long_image_is_refused_by_its_sides() -> None:
    with pytest.raises(
        QuarantineError, match="an image of 2010x10 pixels: its sides have a ratio of 201, and at most 200"
    ):
        PROCESSOR.process(picture(2010, 10))


@pytest.mark.parametrize("limits", [(1, 1), (32 * 32, 32 * 32), (64 * 64, 256 * 256)])
@pytest.mark.parametrize("size", [(6400, 32), (32, 6400), (200, 1), (199, 1), (1, 1), (4000, 3000), (6431, 33)])
def test_no_view_needs_more_blocks_than_there_is_space_for(limits: tuple[int, int], size: tuple[int, int]) -> None:
    processor = replace(PROCESSOR, min_pixels=limits[0], max_pixels=limits[1])
    view, _ = processor.view_of(np.zeros((size[1], size[0], 3), np.uint8))
    assert max(size) <= MAX_ASPECT_RATIO * min(size)
    assert -(-view.nbytes // 65536) <= processor.most_slots


def test_the_decoder_process_gives_blocks_of_each_image(tmp_path: Path) -> None:
    sizes = [(640, 480), (40, 60), (2100, 10), (500, 300)]
    for number, (width, height) in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(picture(width, height))
    decoder = Decoder(PROCESSOR, 60.0)
    places = [Location.parse(tmp_path / f"{number}.png") for number in range(len(sizes))]
    found = []
    for outcome in decoder.decode(places):
        found.append(outcome.slots.copy() if isinstance(outcome, SharedImage) else str(outcome))
    decoder.close()
    for number in (0, 1, 3):
        np.testing.assert_array_equal(found[number], PROCESSOR.process(picture(*sizes[number])).slots)
    assert "ratio of 210" in found[2]
