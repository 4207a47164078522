"""Every kind of awkward file ends as exactly one of: stored as Pillow has it, stored and flagged, quarantined."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_deepstack.config.choices import Orientation
from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.data.images.decoder import Decoder
from megatron_deepstack.data.images.pictures import decode_image
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.data.location import Location
from megatron_deepstack.testing.tiny_data import draw_photo, tiny_recipe

LIMIT = 1_000_000
PROCESSOR = Processor.of(tiny_recipe(data=DataConfig(max_image_pixels=LIMIT)))
UPRIGHT = Processor.of(tiny_recipe(data=DataConfig(orientation=Orientation.EXIF)))
PHOTO = draw_photo(90, 61, 0)
DEEP = Image.fromarray(np.arange(0, 60000, 20, dtype=np.uint16).reshape(50, 60))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, kind, exif=exif)


FORMATS = {
    "jpeg": encoded(PHOTO, "JPEG"),
    "jpeg progressive": encoded(PHOTO, "JPEG", progressive=True),
    "jpeg restart markers": encoded(PHOTO, "JPEG", restart_marker_rows=1),
    "jpeg grey": encoded(PHOTO.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "png": encoded(PHOTO, "PNG"),
    "png palette": encoded(PHOTO.convert("P"), "PNG"),
    "png one bit": encoded(PHOTO.convert("1"), "PNG"),
    "png alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "gif": encoded(PHOTO.convert("P"), "GIF"),
    "gif of two frames": encoded(
        PHOTO.convert("P"), "GIF", save_all=True, append_images=[draw_photo(90, 61, 1).convert("P")]
    ),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF"),
    "tiff lzw": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encoded(PHOTO.convert("CMYK"), "TIFF"),
    "webp": encoded(PHOTO, "WEBP"),
    "webp lossless alpha": encoded(PHOTO.convert("RGBA"), "WEBP", lossless=True),
    **{f"{kind} one pixel wide": encoded(draw_photo(1, 300, 0), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF")},
    **{f"{kind} turned by exif": turned(kind, 6) for kind in ("JPEG", "PNG", "WEBP", "TIFF")},
}
"""Sound files."""

LOSSY = {
    "png 16 bit": (encoded(DEEP, "PNG"), "deep grey: 99.6% of its values are outside 0 to 255 and are cut off"),
    "tiff 16 bit": (encoded(DEEP, "TIFF"), "deep grey: 99.6% of its values are outside 0 to 255 and are cut off"),
    "tiff float": (
        encoded(Image.fromarray(np.linspace(-9, 300, 3000, dtype=np.float32).reshape(50, 60)), "TIFF"),
        "deep grey: 17.5% of its values are outside 0 to 255 and are cut off",
    ),
    "png palette with transparency": (
        encoded(Image.linear_gradient("L").convert("P"), "PNG", transparency=3),
        "transparency: 0.4% of its pixels are not opaque, and the alpha channel is dropped",
    ),
}
"""Whole files of which Pillow's RGB shows less than is in them, and what is said of them."""

BROKEN = {
    "zero bytes": (b"", "the file is empty"),
    "text": (b"not an image", "not an image of a known format"),
    "html": (b"<!doctype html><title>404</title>", "not an image of a known format"),
    "bomb": (encoded(Image.new("1", (5000, 5000)), "PNG"), "more pixels than data.max_image_pixels allows"),
    "jpeg bomb": (encoded(Image.new("L", (2000, 2000)), "JPEG"), "more than data.max_image_pixels allows"),
    "gif bomb": (b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6) + b";", "not an image of a known format"),
    "half a jpeg": (FORMATS["jpeg"][:1000], "cannot be decoded: OSError: .*truncated"),
    "half a png": (FORMATS["png"][:3000], "cannot be decoded: OSError"),
    "postscript": (encoded(PHOTO, "EPS"), "not an image of a known format"),
}
"""Files that hold no picture, or not the whole of it, and why they are quarantined."""

FLAGGED = {
    "jpeg without its end": (FORMATS["jpeg"][:-2], "truncated JPEG: it has no end marker"),
    "png without its end": (FORMATS["png"][:-12], "truncated PNG: it has no IEND chunk"),
    "png with a wrong checksum": (
        FORMATS["png"].replace(b"IEND\xaeB`\x82", b"IEND\xaeB`\x83"),
        "damaged PNG: the checksum of its chunk 'IEND' is wrong",
    ),
    "gif without its end": (FORMATS["gif"][:-1], "truncated GIF: it has no trailer"),
    "gif whose second frame is cut": (FORMATS["gif of two frames"][:-200], "truncated GIF: it has no trailer"),
    "bmp without its padding": (FORMATS["bmp"][:-1], "truncated BMP: 16645 of its 16646 bytes"),
}
"""Files that are not whole, though the picture is, and what is said of them."""


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_corpus(tmp_path: Path) -> None:
    """All of it through the decoder process: the same answers as in this process, none missing, in order."""
    corpus = {**FORMATS, **{name: data for name, (data, _) in {**BROKEN, **FLAGGED, **LOSSY}.items()}}
    for name, data in corpus.items():
        (tmp_path / name).write_bytes(data)
    decoder = Decoder(PROCESSOR, 60.0)
    names = sorted(corpus)
    outcomes = decoder.decode([Location(str(tmp_path / name)) for name in names])
    kinds = {"stored": 0, "flagged": 0, "quarantined": 0}
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, QuarantineError):
            kinds["quarantined"] += 1
            assert name in BROKEN, outcome
            continue
        kinds["flagged" if outcome.damage else "stored"] += 1
        assert outcome.damage == {**FLAGGED, **LOSSY}.get(name, (None, None))[1]
        np.testing.assert_array_equal(outcome.slots, PROCESSOR.process(corpus[name]).slots)
    decoder.close()
    assert kinds == {"stored": len(FORMATS), "flagged": len(FLAGGED) + len(LOSSY), "quarantined": len(BROKEN)}


@pytest.mark.parametrize("name", FORMATS)
def test_sound_files_are_pillows_rgb(name: str) -> None:
    image = decode_image(FORMATS[name], LIMIT)
    assert image.damage is None
    np.testing.assert_array_equal(image.pixels, pillow_rgb(FORMATS[name]))


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_conversions_are_pillows_rgb_and_flagged(name: str) -> None:
    data, reason = LOSSY[name]
    image = decode_image(data, LIMIT)
    assert image.damage == reason
    np.testing.assert_array_equal(image.pixels, pillow_rgb(data))


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "zero bytes"])
def test_files_without_a_picture_are_quarantined(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(QuarantineError, match=reason):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("name", FLAGGED)
def test_damaged_files_with_a_whole_picture_are_flagged(name: str) -> None:
    data, reason = FLAGGED[name]
    image = decode_image(data, LIMIT)
    assert image.damage == reason
    whole = next(FORMATS[kind] for kind in sorted(FORMATS, key=len, reverse=True) if name.startswith(kind))
    np.testing.assert_array_equal(image.pixels, pillow_rgb(whole))


@pytest.mark.parametrize("name", FORMATS)
def test_cut_at_any_byte_a_file_is_flagged_or_quarantined(name: str) -> None:
    """JPEG, PNG, GIF, BMP, TIFF, WebP: whatever is missing, it is noticed; what is kept has the picture's size."""
    data = FORMATS[name]
    shape = pillow_rgb(data).shape
    kept = 0
    for length in {*range(200), *range(200, len(data), 37), *range(max(0, len(data) - 60), len(data))}:
        try:
            image = decode_image(data[:length], LIMIT)
        except QuarantineError:
            continue
        kept += 1
        assert image.damage is not None, f"{length} of {len(data)} bytes were taken for whole"
        assert image.pixels.shape == shape
    assert kept > 0 or not name.startswith(("jpeg", "png", "gif", "bmp")) or "cmyk" in name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(kind: str, orientation: int) -> None:
    data = turned(kind, orientation)
    np.testing.assert_array_equal(decode_image(data, LIMIT).pixels, pillow_rgb(data))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = decode_image(data, LIMIT, Orientation.EXIF)
    assert image.damage is None
    np.testing.assert_array_equal(image.pixels, upright)
    if orientation == 6:
        assert image.pixels.shape == (90, 61, 3)


def test_exif_that_makes_no_sense_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: Image.Image) -> Image.Exif:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    for data in (FORMATS["jpeg"], FORMATS["png"]):
        image = decode_image(data, LIMIT, Orientation.EXIF)
        assert image.damage == "its EXIF data cannot be read: SyntaxError: not a TIFF file"
        np.testing.assert_array_equal(image.pixels, pillow_rgb(data))


def test_any_bytes_give_an_answer() -> None:
    """Bytes changed, inserted, swapped between formats, from a seed: no other exception, and nothing on a warning."""
    generator = random.Random(0)
    kinds = list(FORMATS.values())
    for _ in range(1500):
        data = bytearray(generator.choice(kinds))
        first = generator.randrange(len(data))
        for _ in range(generator.randrange(3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.3:
            data[first:] = generator.choice(kinds)[generator.randrange(200) :]
        try:
            image = decode_image(bytes(data), LIMIT, generator.choice(list(Orientation)))
        except QuarantineError:
            continue
        assert image.pixels.dtype == np.uint8
        assert image.pixels.shape[2] == 3


def test_orientation_decides_grid_and_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(draw_photo(120, 40, 0), "JPEG", exif=exif)
    stored = PROCESSOR.process(data)
    upright = UPRIGHT.process(data)
    assert (stored.size, upright.size) == ((120, 40), (40, 120))
    assert stored.grid == upright.grid[::-1]


def test_a_store_says_how_its_images_were_turned() -> None:
    assert PROCESSOR.describe()["orientation"] == "as_stored"
    assert UPRIGHT.describe()["orientation"] == "exif"
