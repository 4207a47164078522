"""What Pillow's conversion to RGB loses is named; the recipe's options keep it."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from megatron_deepstack.config.check import find_problems
from megatron_deepstack.config.choices import DeepGrey
from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.data.images.colours import ColourRules, to_rgb
from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.testing.tiny_data import draw_photo, tiny_recipe

LIMIT = 10_000_000
SCALE = ColourRules(deep_grey=DeepGrey.SCALE)
WHITE = ColourRules(transparency="#ffffff")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(first: float, last: float, dtype: Any) -> np.ndarray:
    return np.tile(np.linspace(first, last, 512).astype(dtype), (4, 1))


def big_endian(values: np.ndarray) -> Image.Image:
    return Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())


def tiff(values: np.ndarray, tags: dict[int, tuple[int, ...]]) -> bytes:
    """An uncompressed little-endian TIFF of any numbers (height, width, bands), which Pillow cannot write."""
    height, width, samples = values.shape
    bits = (values.dtype.itemsize * 8,) * samples
    known = {256: (width,), 257: (height,), 258: bits, 259: (1,), 277: (samples,), 278: (height,)}
    known |= {262: (1,), 273: (0,), 279: (values.nbytes,), **tags}
    end = 8 + 2 + 12 * len(known) + 4
    known[273] = (end + sum(4 * len(numbers) for numbers in known.values() if len(numbers) > 1),)
    entries, more = b"", b""
    for tag, numbers in sorted(known.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack("<I", end + len(more))
        more += packed if len(numbers) > 1 else b""
    head = b"II*\0" + struct.pack("<IH", 8, len(known)) + entries + bytes(4)
    return head + more + values.astype(values.dtype.newbyteorder("<")).tobytes()


SIXTEEN, SHARE = ramp(0, 65535, np.uint16), ramp(0, 1, np.float32)
DEEP = {
    "16-bit PNG": (encoded(Image.fromarray(SIXTEEN), "PNG"), SIXTEEN / 257, "99.6%"),
    "16-bit TIFF": (encoded(Image.fromarray(SIXTEEN), "TIFF"), SIXTEEN / 257, "99.6%"),
    "16-bit TIFF, big endian": (encoded(big_endian(SIXTEEN), "TIFF"), SIXTEEN / 257, "99.6%"),
    "16-bit PGM": (b"P5 512 4 65535\n" + SIXTEEN.astype(">u2").tobytes(), SIXTEEN / 257, "99.6%"),
    "16-bit JPEG 2000": (
        encoded(Image.fromarray(SIXTEEN), "JPEG2000", irreversible=False),
        SIXTEEN / 257,
        "99.6%",
    ),
    "32-bit TIFF": (encoded(Image.fromarray(ramp(0, 1e9, np.int32)), "TIFF"), ramp(0, 255, float), "99.8%"),
    "32-bit TIFF with signs": (
        encoded(Image.fromarray(ramp(-1e9, 1e9, np.int32)), "TIFF"),
        ramp(0, 255, float),
        "100.0%",
    ),
    "unsigned 32-bit TIFF": (tiff(ramp(0, 2**32 - 1, np.uint32)[..., None], {339: (1,)}), ramp(0, 255, float), "99.8%"),
    "float TIFF of 0 to 1": (encoded(Image.fromarray(SHARE), "TIFF"), SHARE * 255, "between 0 and 1"),
    "float TIFF": (encoded(Image.fromarray(ramp(-5, 1000, np.float32)), "TIFF"), ramp(0, 255, float), "74.6%"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_flagged_and_scaled(name: str) -> None:
    data, expected, said = DEEP[name]
    published = decode_image(data, LIMIT)
    np.testing.assert_array_equal(published.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert published.damage is not None
    assert published.damage.startswith("deep grey: ")
    assert said in published.damage
    scaled = decode_image(data, LIMIT, colours=SCALE)
    assert scaled.damage is None
    assert scaled.pixels.shape == (4, 512, 3)
    # Half a level by rounding; of the ranges that are stretched, values of the ramp are whole numbers themselves.
    assert np.abs(scaled.pixels[..., 0] - expected).max() <= 0.51
    assert (scaled.pixels == scaled.pixels[..., :1]).all()
    assert (scaled.pixels.min(), scaled.pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("values", "published", "scaled"),
    [
        (ramp(0, 255, np.uint16), None, None),
        (ramp(0, 255, np.float32), None, None),
        (ramp(0, 0, np.float32), None, None),
        (ramp(0, 4095, np.uint16), "outside 0 to 255", "greatest value is 4095 of 65535, so that it is nearly black"),
        (ramp(9e5, 9e5, np.int32), "100.0% of its values", "all its values are alike, so that it is black"),
        (np.where(ramp(0, 1, float) < 0.5, np.nan, 9).astype(np.float32), "1024 of its values are no n", "1024 of its"),
        (np.where(ramp(0, 1, float) < 0.5, np.inf, 0.5).astype(np.float32), "no numbers; its values lie", "no numbers"),
    ],
    ids=["8 bits in 16", "8 bits in floats", "all 0", "12 bits", "one value", "not a number", "infinite"],
)
def test_ranges_of_deep_greys(values: np.ndarray, published: str | None, scaled: str | None) -> None:
    image = Image.fromarray(values)
    for rules, expected in ((ColourRules(), published), (SCALE, scaled)):
        pixels, lost = to_rgb(image, rules)
        assert pixels.dtype == np.uint8
        assert (expected in lost) if expected and lost else (expected is lost is None), lost


def drawing(mode: str) -> Image.Image:
    """A black rectangle on transparency; everything is black but for the alpha channel."""
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (10, 10, 30, 20))
    return image.convert(mode)


def palette_drawing() -> Image.Image:
    image = Image.new("P", (40, 30), 0)
    image.putpalette([0, 0, 0] * 256)
    image.paste(1, (10, 10, 30, 20))
    return image


def keyed(mode: str, key: Any, other: Any) -> Image.Image:
    image = Image.new(mode, (40, 30), key)
    image.paste(other, (10, 10, 30, 20))
    return image


TRANSPARENT = {
    "RGBA PNG": encoded(drawing("RGBA"), "PNG"),
    "RGBA WebP": encoded(drawing("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": encoded(drawing("RGBA"), "TIFF"),
    "LA PNG": encoded(drawing("LA"), "PNG"),
    "palette PNG": encoded(palette_drawing(), "PNG", transparency=0),
    "palette PNG with an alpha table": encoded(palette_drawing(), "PNG", transparency=bytes([0, 255])),
    "GIF": encoded(palette_drawing(), "GIF", transparency=0),
    "grey PNG with a transparent level": encoded(keyed("L", 1, 0), "PNG", transparency=1),
    "RGB PNG with a transparent colour": encoded(keyed("RGB", (1, 0, 0), (0, 0, 0)), "PNG", transparency=(1, 0, 0)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_flagged_or_laid_on_a_colour(name: str) -> None:
    data = TRANSPARENT[name]
    published = decode_image(data, LIMIT)
    np.testing.assert_array_equal(published.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert published.damage == ("transparency: 83.3% of its pixels are not opaque, and the alpha channel is dropped")
    for colour, ground in (("#ffffff", (255, 255, 255)), ("#102030", (16, 32, 48))):
        laid = decode_image(data, LIMIT, colours=ColourRules(transparency=colour))
        assert laid.damage is None
        assert (laid.pixels[0, 0] == ground).all()
        assert (laid.pixels[15, 20] == 0).all()


def test_half_transparent_pixels_are_mixed_as_pillow_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
    image = Image.fromarray(pixels)
    laid, lost = to_rgb(image, ColourRules(transparency="#80ff00"))
    under = Image.new("RGBA", image.size, (128, 255, 0, 255))
    expected = np.asarray(Image.alpha_composite(under, image).convert("RGB")).astype(int)
    assert lost is None
    assert np.abs(laid.astype(int) - expected).max() <= 1  # Pillow rounds in two steps


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode: str) -> None:
    image = drawing("RGBA" if mode == "RGBa" else "LA").convert(mode)
    assert to_rgb(image, ColourRules())[1] is not None
    assert (to_rgb(image, WHITE)[0][0, 0] == 255).all()


def test_deep_grey_with_a_transparent_level() -> None:
    data = encoded(Image.fromarray(SIXTEEN), "PNG", transparency=0)
    said = decode_image(data, LIMIT).damage
    assert said is not None
    assert said.startswith("deep grey: ")
    assert "; transparency: 0.2% of its pixels" in said
    both = decode_image(data, LIMIT, colours=ColourRules(DeepGrey.SCALE, "#ff0000"))
    assert both.damage is None
    assert both.pixels[0, 0].tolist() == [255, 0, 0]
    assert both.pixels[0, -1].tolist() == [255, 255, 255]


PHOTO = draw_photo(60, 40, 0)
FAITHFUL = {
    "RGBA, all opaque": encoded(PHOTO.convert("RGBA"), "PNG"),
    "LA, all opaque": encoded(PHOTO.convert("LA"), "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "palette, no pixel of the transparent colour": encoded(keyed("P", 1, 2), "PNG", transparency=0),
    "one bit": encoded(PHOTO.convert("1"), "PNG"),
    "one bit TIFF": encoded(PHOTO.convert("1"), "TIFF"),
    "CMYK": encoded(PHOTO.convert("CMYK"), "TIFF"),
    "YCbCr": encoded(PHOTO.convert("YCbCr"), "TIFF"),
    "Lab": encoded(
        ImageCms.applyTransform(
            PHOTO,
            ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
        ),
        "TIFF",
    ),
    "16-bit RGB": b"P6 2 1 65535\n" + bytes([255, 255, 0, 0, 128, 0] * 2),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_conversions_that_lose_nothing_are_not_flagged(name: str) -> None:
    data = FAITHFUL[name]
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for rules in (ColourRules(), ColourRules(DeepGrey.SCALE, "#ffffff")):
        image = decode_image(data, LIMIT, colours=rules)
        assert image.damage is None
        np.testing.assert_array_equal(image.pixels, expected)


def test_bands_beyond_the_colours_are_named() -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 5), np.uint8)
    data = tiff(values, {262: (2,), 338: (0, 0)})
    assert decode_image(data, LIMIT).damage == "left-out bands: 2 of its 5 bands are not read"


def test_the_options_are_part_of_the_processor() -> None:
    plain = Processor.of(tiny_recipe())
    asked = Processor.of(tiny_recipe(data=DataConfig(deep_grey=DeepGrey.SCALE, transparency="#FFFFFF")))
    assert {"deep_grey": "as_published", "transparency": "as_published"}.items() <= plain.describe().items()
    assert {"deep_grey": "scale", "transparency": "#ffffff"}.items() <= asked.describe().items()
    data = encoded(Image.fromarray(SIXTEEN), "PNG")
    assert plain.process(data).damage is not None
    assert asked.process(data).damage is None


@pytest.mark.parametrize("value", ["#ffffff", "'#ffffff'", '"#ffffff"'])
def test_a_colour_as_an_override(value: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    assert load_recipe(tmp_path / "r.yaml", [f"data.transparency={value}"]).data.transparency == "#ffffff"


@pytest.mark.parametrize("value", ["white", "#fff", "ffffff", "#gggggg"])
def test_other_words_for_a_colour_are_refused(value: str) -> None:
    said = "\n".join(str(problem) for problem in find_problems(tiny_recipe(data=DataConfig(transparency=value))))
    assert f"found '{value}', expected as_published, or a colour as" in said
