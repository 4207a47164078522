"""From an image file to its views: reading, decoding, resizing, cutting.

Decoding is Pillow's conversion to RGB, as the published preprocessing has it, with two additions. JPEGs go through
simplejpeg first, bit-equal and 1.5 times faster, because its strict mode notices damage in mid-file that Pillow turns
into wrong pixels silently: what only Pillow accepts is kept and flagged. And whatever cannot be decoded is quarantined
with a reason, never a crash. EXIF orientation is not applied (as published). Resizing is Pillow's bicubic, stretched
to the canvas without padding.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import simplejpeg
from PIL import Image

from megatron_deepstack.config.choices import ImageResize
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.views import HIGH_RES_SIDE, Grid, ViewLayout

_UNREADABLE: Final = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "file name too long",
    errno.ELOOP: "symbolic links in a circle",
    errno.EINVAL: "not a valid file name",
}
"""Errors that belong to one path; others (a broken disk, a lost mount) belong to the machine and stop the part."""
_MAX_BYTES_PER_PIXEL: Final = 8
"""16-bit RGBA, the largest uncompressed pixel; a file with more bytes than that per allowed pixel is not read."""
_JPEG_COLORS: Final = {"YCbCr", "Gray"}
"""JPEG colour spaces that simplejpeg turns into Pillow's RGB bit for bit (CMYK differs)."""
_RUNNING_PROGRAMS: Final = {"EPS"}
"""Formats that Pillow hands to an outside program (Ghostscript): a data set must not start any."""


class QuarantineError(Exception):
    """The image cannot be used; the message is the reason, without its path."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as RGB."""

    pixels: np.ndarray
    """uint8 (height, width, 3)."""
    damage: str | None
    """What is wrong with the file although it could be decoded."""


def read_image_file(path: str, max_pixels: int) -> bytes:
    """Bytes of an image file.

    Raises QuarantineError for a path that cannot be a usable image (missing, not a regular file, empty, larger than
    any image of `max_pixels`), DataError when the machine fails to read it.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise QuarantineError("not a regular file")
        if status.st_size == 0:
            raise QuarantineError("the file is empty")
        if status.st_size > max_pixels * _MAX_BYTES_PER_PIXEL + 65536:
            raise QuarantineError(f"the file has {status.st_size} bytes, too many for {max_pixels} pixels")
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:
        raise QuarantineError(f"not a valid file name: {error}") from error
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise QuarantineError(_UNREADABLE[error.errno]) from error
        raise DataError(
            f"{path}: reading failed: {error.strerror or error}. This is the machine's or the network's fault, not the "
            "image's; run the same command again when it is mended."
        ) from error


def decode_image(data: bytes, max_pixels: int) -> DecodedImage:
    """Decode any format Pillow knows, but for EPS, to RGB (the first frame of several).

    Raises QuarantineError for data that is no image, cannot be decoded, or has more than `max_pixels` pixels.
    """
    damage = None
    if data[:2] == b"\xff\xd8":
        try:
            pixels = _decode_jpeg(data, max_pixels)
            if pixels is not None:
                return DecodedImage(pixels, None)
        except ValueError as error:
            damage = f"damaged JPEG: {error}"
    return DecodedImage(_decode_with_pillow(data, max_pixels), damage)


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Strictly decoded pixels; None where the colour space is Pillow's business. Raises ValueError on any damage."""
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    _check_pixels(width, height, max_pixels)
    if colors not in _JPEG_COLORS:
        return None
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    with _pillow_limit(max_pixels):
        try:
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                _check_pixels(*image.size, max_pixels)
                return np.array(image.convert("RGB"))
        except QuarantineError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise QuarantineError(f"more pixels than data.max_image_pixels allows ({max_pixels}): {error}") from error
        except Image.UnidentifiedImageError as error:
            raise QuarantineError("not an image of a known format") from error
        except Exception as error:
            # Damaged files make Pillow's parsers raise almost anything: OSError, SyntaxError, struct.error, KeyError...
            raise QuarantineError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _RUNNING_PROGRAMS]


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own check, which also guards frames and embedded images, with our limit and as an error."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise QuarantineError(f"an image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise QuarantineError(
            f"{width} x {height} is {width * height} pixels, more than data.max_image_pixels allows ({max_pixels})"
        )


def make_views(pixels: np.ndarray, grid: Grid, layout: ViewLayout, crop_size: int, resize: ImageResize) -> np.ndarray:
    """All views of an RGB image (uint8, height x width x 3) in stored order: uint8 (views, S, S, 3).

    CROPS: the global view, then the image stretched over the grid, cut in raster order. HIGH_RES: the same, then the
    2x2 high-res crops of the global view, then of each crop in turn (paper section 3.3).
    """
    canvas = _Canvas(pixels, crop_size, resize)
    views = [canvas.cut((1, 1))]
    if layout is not ViewLayout.GLOBAL:
        views.append(canvas.cut(grid))
    if layout is ViewLayout.HIGH_RES:
        views.append(canvas.cut((HIGH_RES_SIDE, HIGH_RES_SIDE)))
        views.append(_group_by_crop(canvas.cut((grid[0] * HIGH_RES_SIDE, grid[1] * HIGH_RES_SIDE)), grid))
    return np.concatenate(views)


class _Canvas:
    """An image that can be stretched over any grid of square views."""

    def __init__(self, pixels: np.ndarray, crop_size: int, resize: ImageResize) -> None:
        self._pixels = pixels
        self._crop_size = crop_size
        self._resize = _resize_with_torch if resize is ImageResize.TORCH else _resize_with_pillow

    def cut(self, grid: Grid) -> np.ndarray:
        """The stretched image in raster order: uint8 (gw*gh, S, S, 3)."""
        (gw, gh), side = grid, self._crop_size
        stretched = self._resize(self._pixels, gw * side, gh * side)
        return stretched.reshape(gh, side, gw, side, 3).transpose(0, 2, 1, 3, 4).reshape(gh * gw, side, side, 3)


def _group_by_crop(high_res: np.ndarray, grid: Grid) -> np.ndarray:
    """Reorder raster-ordered high-res crops so that those of one crop follow each other."""
    (gw, gh), side = grid, HIGH_RES_SIDE
    rest = high_res.shape[1:]
    return high_res.reshape(gh, side, gw, side, *rest).transpose(0, 2, 1, 3, 4, 5, 6).reshape(-1, *rest)


def _resize_with_pillow(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _resize_with_torch(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """About 3 times faster than Pillow; 0.4 % of the values differ, by at most 2."""
    import torch  # an option of the recipe: 1.5 s to import, which the exact path need not pay

    planes = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
