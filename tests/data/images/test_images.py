"""Decoding and views: Pillow's answer for everything that is an image, a reason for everything that is not."""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.choices import ImageResize
from megatron_deepstack.data.images.pictures import decode_image, make_views
from megatron_deepstack.data.images.source import QuarantineError, read_image
from megatron_deepstack.data.location import Location
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.testing.tiny_data import draw_photo, jpeg_bytes

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(data: bytes, position: float) -> bytes:
    at = int(len(data) * position)
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def with_orientation(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.open(io.BytesIO(data)), "JPEG", quality=90, exif=exif)


def animated() -> bytes:
    frames = [draw_photo(40, 30, seed).convert("P") for seed in (1, 2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


PHOTO = draw_photo(90, 61, 0)

GOOD = {
    "jpeg 4:2:0": jpeg_bytes(90, 61, 0, subsampling=2),
    "jpeg 4:2:2": jpeg_bytes(90, 61, 0, subsampling=1),
    "jpeg 4:4:4": jpeg_bytes(91, 61, 0, subsampling=0),
    "jpeg progressive": jpeg_bytes(90, 61, 0, progressive=True),
    "jpeg restart markers": jpeg_bytes(90, 61, 0, restart_marker_rows=1),
    "jpeg stored as rgb": jpeg_bytes(90, 61, 0, keep_rgb=True),
    "jpeg grey": encoded(PHOTO.convert("L"), "JPEG"),
    "jpeg cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "jpeg turned by exif": with_orientation(jpeg_bytes(90, 61, 0)),
    "jpeg one pixel": jpeg_bytes(1, 1, 0),
    "jpeg one pixel wide": jpeg_bytes(1, 500, 0),
    "png": encoded(PHOTO, "PNG"),
    "png palette": encoded(PHOTO.convert("P"), "PNG"),
    "png alpha": encoded(PHOTO.convert("RGBA"), "PNG"),
    "png grey and alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "png one bit": encoded(PHOTO.convert("1"), "PNG"),
    "png one pixel wide": encoded(draw_photo(1, 700, 0), "PNG"),
    "gif": encoded(PHOTO.convert("P"), "GIF"),
    "gif of two frames": animated(),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF"),
    "webp": encoded(PHOTO, "WEBP"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_are_pillows_rgb(name: str) -> None:
    image = decode_image(GOOD[name], LIMIT)
    assert image.damage is None
    np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(GOOD[name])).convert("RGB")))


def test_damage_in_mid_file_is_flagged() -> None:
    data = jpeg_bytes(300, 200, 0, restart_marker_rows=1)
    flagged = 0
    for position in np.linspace(0.2, 0.9, 40):
        damaged = flipped(data, float(position))
        try:
            image = decode_image(damaged, LIMIT)
        except QuarantineError:
            continue
        if image.damage is not None:
            flagged += 1
            assert image.damage.startswith("damaged JPEG: ")
            np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB")))
    assert flagged > 0, "no flipped byte was noticed although Pillow accepts the file"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text named .jpg", b"this is not an image", "not an image of a known format"),
        ("a jpeg's first bytes", b"\xff\xd8\xff\xe0", "."),
        ("cut png", encoded(PHOTO, "PNG")[:2000], "."),
        ("cut jpeg", jpeg_bytes(90, 61, 0)[:900], "cannot be decoded: OSError: .*truncated"),
        (
            "bomb",
            encoded(Image.new("1", (5000, 5000)), "PNG"),
            r"more pixels than data.max_image_pixels allows \(1000000\): .*25000000 pixels",
        ),
        ("jpeg bomb", encoded(Image.new("L", (2000, 2000)), "JPEG"), "4000000 pixels, more than data.max_image_pixels"),
        ("program for ghostscript", encoded(PHOTO, "EPS"), "not an image of a known format"),
        (
            "svg",
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
            "known format: it is an SVG drawing",
        ),
        (
            "png header alone",
            encoded(PHOTO, "PNG")[:31],
            "a damaged image: it begins like a PNG image, and its header is broken or cut off",
        ),
    ],
)
def test_bad_images_are_quarantined(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(QuarantineError, match=reason):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_cut_anywhere_a_file_is_decoded_or_quarantined(kind: str) -> None:
    data = encoded(PHOTO.convert("P") if kind == "GIF" else PHOTO, kind)
    for length in {*range(64), *range(64, len(data), max(1, len(data) // 40))}:
        with suppress(QuarantineError):  # any other error would stop a job
            assert decode_image(data[:length], LIMIT).pixels.shape == (61, 90, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder, not a file"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links in a circle"),
        (lambda path: path.write_bytes(bytes(9_000_000)), "9000000 bytes, too many for 1000000 pixels"),
    ],
    ids=["missing", "folder", "empty", "pipe", "link to itself", "huge"],
)
def test_unusable_paths(make: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    make(path)  # type: ignore[operator]
    with pytest.raises(QuarantineError, match=reason):
        read_image(Location(str(path)), LIMIT)


@pytest.mark.parametrize(("name", "reason"), [("a\0b.jpg", "not a valid file name"), ("x" * 300, "file name too long")])
def test_impossible_names(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match=reason):
        read_image(Location(str(tmp_path / name)), LIMIT)


@pytest.mark.parametrize("size", [(300, 200), (20, 11), (1, 400)])
def test_views_are_pillows_bicubic_cut_in_raster_order(size: tuple[int, int]) -> None:
    photo = draw_photo(*size, seed=3)
    views = make_views(np.asarray(photo), (3, 2), ViewLayout.HIGH_RES, 14, ImageResize.PILLOW)
    assert views.shape == (7 * 5, 14, 14, 3)
    np.testing.assert_array_equal(views[0], np.asarray(photo.resize((14, 14))))
    wide = np.asarray(photo.resize((42, 28)))
    np.testing.assert_array_equal(views[1 + 1 * 3 + 2], wide[14:28, 28:42])
    own = np.asarray(photo.resize((28, 28)))
    np.testing.assert_array_equal(views[7 + 2], own[14:28, 0:14])
    wider = np.asarray(photo.resize((84, 56)))  # crop (column 2, row 1), its lower left quarter
    np.testing.assert_array_equal(views[7 + 4 + 5 * 4 + 2], wider[42:56, 56:70])


def test_torch_resizing_stays_within_two_levels() -> None:
    pixels = np.asarray(draw_photo(640, 480, 1))
    exact, fast = (make_views(pixels, (2, 2), ViewLayout.CROPS, 112, kind).astype(int) for kind in ImageResize)
    distance = np.abs(exact - fast)
    assert distance.max() <= 2
    assert (distance > 0).mean() < 0.01  # measured: 0.2 % on photographs
