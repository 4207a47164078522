"""Pillow's images as RGB, and what the conversion loses.

The published preprocessing calls Pillow's `convert("RGB")` for everything. That damages some images silently. Grey of
more than 8 bits is cut off at 255, so that a 16-bit scan becomes white, and floats of 0 to 1 become black. The alpha
channel is dropped, so that a black drawing on transparency becomes completely black. Bands beyond the colours are left
out. Such an image is stored as published, unless the recipe asks for something else, and the loss is recorded.

These are not counted as a loss: CMYK and wide-gamut colours (the numbers are kept, their profile is not applied),
16-bit RGB (Pillow keeps the upper 8 bits), gain maps, and frames after the first (the picture itself is whole).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageColor

from megatron_deepstack.config.choices import DeepGrey

AS_PUBLISHED: Final = "as_published"
_DEEP_MODES: Final = ("I", "F")
"""Modes of one band with more than 8 bits; those whose name begins with `_SIXTEEN_BITS` come in addition."""
_SIXTEEN_BITS: Final = "I;16"
_PREMULTIPLIED: Final = {"La": "LA", "RGBa": "RGBA"}
_NEARLY_BLACK: Final = 16 * 257
"""Scaled values below this take less than a sixteenth of the 8-bit range."""
_TIFF_BITS, _TIFF_SAMPLES, _TIFF_SAMPLE_FORMAT = 258, 277, 339


@dataclass(frozen=True, slots=True)
class ColourRules:
    """What is done about images that Pillow's conversion to RGB would damage."""

    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    transparency: str = AS_PUBLISHED
    """`as_published`, or a colour as #rrggbb."""


def to_rgb(image: Image.Image, rules: ColourRules) -> tuple[np.ndarray, str | None]:
    """Convert an image to RGB.

    Args:
        image: A loaded image in any of Pillow's modes.
        rules: What is done about grey of more than 8 bits, and about transparency.

    Returns:
        uint8 (height, width, 3), and what was lost by the conversion, as `KIND: DETAILS`; None if nothing was lost.

    Raises:
        ValueError: Pillow cannot convert the image's mode to RGB.
    """
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if _is_deep_grey(image):
        pixels, loss = _from_deep_grey(image, rules.deep_grey)
    else:
        pixels, loss = np.asarray(image.convert("RGB")), _left_out_bands(image)
    if not image.has_transparency_data:
        return pixels, loss
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    share = float(np.mean(alpha < 255))
    if share == 0:
        return pixels, loss
    if rules.transparency != AS_PUBLISHED:
        return _laid_on(pixels, alpha, ImageColor.getrgb(rules.transparency)), loss
    dropped = f"transparency: {share:.1%} of its pixels are not opaque, and the alpha channel is dropped"
    return pixels, "; ".join(filter(None, [loss, dropped]))


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in _DEEP_MODES or image.mode.startswith(_SIXTEEN_BITS)


def _from_deep_grey(image: Image.Image, rule: DeepGrey) -> tuple[np.ndarray, str | None]:
    values = _grey_values(image)
    finite = np.isfinite(values)
    odd = values.size - int(np.count_nonzero(finite))
    if odd:
        values = np.where(finite, values, 0)
    least, greatest = (values.min(), values.max()) if values.size else (0, 0)
    fits = least >= 0 and greatest <= 255 and not _is_share(values, greatest)
    no_numbers = [f"{odd} of its values are no numbers"] if odd else []
    if fits or rule is DeepGrey.AS_PUBLISHED:
        lost = no_numbers if fits else [*no_numbers, _cut_off(values, greatest)]
        return np.asarray(image.convert("RGB")), _deep_grey(lost)
    scaled, what = _scaled(values, least, greatest)
    return np.repeat(scaled[..., None], 3, axis=2), _deep_grey([*no_numbers, *what])


def _grey_values(image: Image.Image) -> np.ndarray:
    """The image's numbers (height, width) as they are in its file."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_TIFF_BITS) == (32,) and tags.get(_TIFF_SAMPLE_FORMAT, (1,)) in (1, (1,)):
        return values.view(np.uint32)  # Pillow has no mode for these, and shows the upper half as negative numbers
    return values


def _is_share(values: np.ndarray, greatest: float) -> bool:
    """Whether the values are floats of 0 to 1."""
    return bool(values.dtype.kind == "f" and 0 < greatest <= 1)


def _cut_off(values: np.ndarray, greatest: float) -> str:
    if values.min() >= 0 and _is_share(values, greatest):
        return "its values lie between 0 and 1 and become black"
    share = float(np.mean((values < 0) | (values > 255)))
    return f"{share:.1%} of its values are outside 0 to 255 and are cut off"


def _scaled(values: np.ndarray, least: float, greatest: float) -> tuple[np.ndarray, list[str]]:
    """Values of any range as uint8, and the remarks about them; the rule is described at `data.deep_grey`."""
    if least >= 0 and _is_share(values, greatest):
        return np.rint(values * 255).astype(np.uint8), []
    if values.dtype.kind != "f" and least >= 0 and greatest <= 65535:
        dark = [f"its greatest value is {greatest} of 65535, so that it is nearly black"]
        scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return scaled, dark if greatest < _NEARLY_BLACK else []
    if least == greatest:
        return np.zeros(values.shape, np.uint8), ["all its values are alike, so that it is black"]
    shifted = values.astype(np.float64) - float(least)
    return np.rint(shifted * (255 / (float(greatest) - float(least)))).astype(np.uint8), []


def _deep_grey(lost: list[str]) -> str | None:
    return f"deep grey: {'; '.join(lost)}" if lost else None


def _left_out_bands(image: Image.Image) -> str | None:
    """The remark for a TIFF that has bands beyond its colours, which Pillow does not read; None for all others."""
    bands, samples = len(image.getbands()), getattr(image, "tag_v2", {}).get(_TIFF_SAMPLES, 1)
    if image.format == "TIFF" and isinstance(samples, int) and samples > bands:
        return f"left-out bands: {samples - bands} of its {samples} bands are not read"
    return None


def _laid_on(pixels: np.ndarray, alpha: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Pixels over one colour: alpha / 255 of the pixel plus the remaining share of the colour, rounded."""
    share = alpha[..., None].astype(np.uint32)
    mixed = pixels * share + np.array(colour[:3], np.uint32) * (255 - share)
    return ((mixed + 127) // 255).astype(np.uint8)
