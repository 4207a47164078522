"""Images and prompts for DeepStack models: views of images, and placeholders for their tokens.

An image is stretched to the size of a view (the global view) and, where the model uses crops, to a grid of views that
fits its shape, which is cut in raster order. Aspect ratios are not kept and nothing is padded. All of it is done by
Pillow, as in training, so that the pixels are the same to the last bit; images in files are taken as they are stored,
unless `orientation` is `exif`.

This file needs numpy, Pillow, torch and transformers only; it is copied beside the weights.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.processing_utils import MultiModalData

HIGH_RES_SIDE = 2
"""Number of high-res crops of a view in each direction."""

Grid = tuple[int, int]
"""Columns and rows of an image's crops."""


def pick_grid(width: int, height: int, view_size: int, num_crops: int) -> Grid:
    """The grid of up to `num_crops` crops that keeps most of an image when that is fitted in with its aspect ratio.

    Args:
        width: Width of the image in pixels.
        height: Its height.
        view_size: Side of a crop.
        num_crops: Largest number of crops.

    Returns:
        Columns and rows; of equal grids the one with the smallest unused part, then the first by columns.
    """
    sides = range(1, num_crops + 1)

    def fit(grid: Grid) -> tuple[int, int]:
        canvas_width, canvas_height = grid[0] * view_size, grid[1] * view_size
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_width * canvas_height

    return max(((gw, gh) for gw in sides for gh in sides if 1 < gw * gh <= num_crops), key=fit)


class DeepStackImageProcessor(BaseImageProcessor):
    """Makes the views of images."""

    model_input_names = ["pixel_values", "image_grids"]  # noqa: RUF012

    def __init__(
        self,
        view_size: int = 336,
        views: str = "crops",
        grid: str = "best_fit",
        num_crops: int = 4,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        resize: str = "pillow",
        orientation: str = "as_stored",
        deep_grey: str = "as_published",
        transparency: str = "as_published",
        max_image_pixels: int = 178_956_970,
        **kwargs: Any,
    ) -> None:
        """Set how views are made.

        Args:
            view_size: Side of a view in pixels.
            views: `global` for the global view alone, `crops` for crops after it, `high_res` for 2x2 crops of each of
                those too.
            grid: `best_fit` or `fixed_2x2`.
            num_crops: Largest number of crops of an image, for `best_fit`.
            image_mean: Mean of each channel, of pixels between 0 and 1.
            image_std: Standard deviation of each channel.
            resize: `pillow`, or `torch`, whose results differ a little.
            orientation: `exif` to turn photos as their EXIF tag says, or `as_stored`.
            deep_grey: `scale` to bring grey of more than 8 bits to 8, or `as_published`, which cuts it off at 255.
            transparency: Colour as #rrggbb on which transparent images are laid, or `as_published`, which drops the
                alpha channel.
            max_image_pixels: Images with more pixels are refused.
            **kwargs: What transformers adds.
        """
        super().__init__(**kwargs)
        self.view_size = view_size
        self.views = views
        self.grid = grid
        self.num_crops = num_crops
        self.image_mean = list(image_mean or [0.48145466, 0.4578275, 0.40821073])
        self.image_std = list(image_std or [0.26862954, 0.26130258, 0.27577711])
        self.resize = resize
        self.orientation = orientation
        self.deep_grey = deep_grey
        self.transparency = transparency
        self.max_image_pixels = max_image_pixels

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images of paths, URLs and data; files are opened here, since transformers would turn photos."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith("data:"):
            return _open(_content_of_url(image_url_or_urls), "an image in a data: URL")
        if isinstance(image_url_or_urls, str | os.PathLike) and Path(image_url_or_urls).is_file():
            return _open(Path(image_url_or_urls).read_bytes(), str(image_url_or_urls))
        return load_image(image_url_or_urls) if isinstance(image_url_or_urls, str) else image_url_or_urls

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Make the views of images.

        Args:
            images: One or several images, nested as you like: Pillow's, arrays, paths or URLs.
            return_tensors: `pt` or `np`.
            **kwargs: Not used.

        Returns:
            `pixel_values` float32 (views of all images, 3, side, side), and `image_grids` int64 (images, 2), columns
            and rows of crops.

        Raises:
            ValueError: An image cannot be read, or is too large.
        """
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        made = [self.make_views(image) for image in flat]
        pixels = torch.from_numpy(np.concatenate([views for views, _ in made])).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values)[:, None, None] * 255.0 for values in (self.image_mean, self.image_std))
        data: dict[str, Any] = {
            "pixel_values": (pixels - mean) / std,
            "image_grids": torch.tensor([grid for _, grid in made]),
        }
        if return_tensors != "pt":
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def make_views(self, image: Any) -> tuple[np.ndarray, Grid]:
        """The views of an image, uint8 (views, side, side, 3), and the grid of its crops."""
        picture = self._as_rgb(image)
        grid = self.pick_grid(picture.width, picture.height)
        views = [self._cut(picture, (1, 1))]
        if self.views != "global":
            views.append(self._cut(picture, grid))
        if self.views == "high_res":
            (columns, rows), side = grid, HIGH_RES_SIDE
            views.append(self._cut(picture, (side, side)))
            raster = self._cut(picture, (columns * side, rows * side))
            by_crop = raster.reshape(rows, side, columns, side, *raster.shape[1:]).transpose(0, 2, 1, 3, 4, 5, 6)
            views.append(by_crop.reshape(raster.shape))
        return np.concatenate(views), grid

    def pick_grid(self, width: int, height: int) -> Grid:
        """The grid of an image, see the function `pick_grid`.

        Args:
            width: Width of the image in pixels.
            height: Its height.

        Returns:
            Columns and rows of crops; (1, 1) for the global view alone.
        """
        if self.views == "global":
            return 1, 1
        return (2, 2) if self.grid == "fixed_2x2" else pick_grid(width, height, self.view_size, self.num_crops)

    def _cut(self, picture: Image.Image, grid: Grid) -> np.ndarray:
        """The picture stretched over a grid of views, in raster order."""
        (columns, rows), side = grid, self.view_size
        stretched = _stretch(picture, (columns * side, rows * side), self.resize)
        tiles = stretched.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(-1, side, side, 3)

    def _as_rgb(self, image: Any) -> Image.Image:
        if not isinstance(image, Image.Image):
            image = _from_array(image)
        if image.width * image.height > self.max_image_pixels:
            raise ValueError(
                f"an image has {image.width} x {image.height} pixels, more than max_image_pixels allows "
                f"({self.max_image_pixels}); make it smaller, or raise max_image_pixels in processor_config.json"
            )
        try:
            image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"an image ({getattr(image, 'filename', '') or image.format}) is broken: {error}"
            ) from error
        turned = ImageOps.exif_transpose(image) if self.orientation == "exif" else image
        picture = Image.fromarray(_grey_to_rgb(turned)) if self._scales(turned) else turned.convert("RGB")
        if self.transparency == "as_published" or not turned.has_transparency_data:
            return picture
        return _laid_on(picture, turned.convert("RGBA"), self.transparency)

    def _scales(self, image: Image.Image) -> bool:
        return self.deep_grey == "scale" and (image.mode in ("I", "F") or image.mode.startswith("I;16"))


def _content_of_url(url: str) -> bytes:
    """The bytes that a `data:` URL holds, which is how servers are given pictures."""
    kind, _, content = url.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError(f"it begins with {kind[:40]!r}")
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"images: a data: URL cannot be read ({error}); expected data:image/...;base64,...") from error


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (Image.UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name}: cannot be read as an image: {error}") from error


def _from_array(image: Any) -> Image.Image:
    """An image from numbers: channels first or last, 0 to 255, or 0 to 1 if they are no integers."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f" and array.max(initial=0) <= 1:
        array = np.rint(array * 255)
    array = array.astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else np.ascontiguousarray(array))


def _stretch(picture: Image.Image, size: tuple[int, int], how: str) -> np.ndarray:
    if how == "pillow":
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    planes = torch.from_numpy(np.array(picture)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, size[::-1], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _grey_to_rgb(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits: 0 to 65535 and 0 to 1 by their range, other values by their least and greatest."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) in (1, (1,)):
        values = values.view(np.uint32)  # 32 bits without sign, which Pillow shows as numbers with one
    values = np.where(np.isfinite(values), values, 0)
    least, greatest = (values.min(), values.max()) if values.size else (0, 0)
    is_float = values.dtype.kind == "f"
    is_share = is_float and 0 < greatest <= 1
    if least >= 0 and greatest <= 255 and not is_share:
        return np.asarray(image.convert("RGB"))
    if least >= 0 and is_share:
        grey = np.rint(values * 255)
    elif not is_float and least >= 0 and greatest <= 65535:
        grey = (values.astype(np.uint32) + 128) // 257
    elif least == greatest:
        grey = np.zeros(values.shape)
    else:
        grey = np.rint((values.astype(np.float64) - float(least)) * (255 / (float(greatest) - float(least))))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _laid_on(picture: Image.Image, with_alpha: Image.Image, colour: str) -> Image.Image:
    """A picture over one colour: alpha / 255 of each pixel, and the remaining share of the colour."""
    alpha = np.asarray(with_alpha)[..., 3]
    if not (alpha < 255).any():
        return picture
    below = np.array(ImageColor.getrgb(colour)[:3], np.uint32)
    share = alpha[..., None].astype(np.uint32)
    mixed = (np.asarray(picture).astype(np.uint32) * share + below * (255 - share) + 127) // 255
    return Image.fromarray(mixed.astype(np.uint8))


class DeepStackProcessor(ProcessorMixin):
    """Prompts with images: the image processor and the tokenizer together."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        patch_size: int = 14,
        context: str = "global",
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        """Put the two together.

        Args:
            image_processor: Makes views of images.
            tokenizer: Has `image_token` as one token.
            chat_template: How a conversation is written.
            patch_size: Side of a patch of the vision tower.
            context: What takes an image's place in the sequence, see `DeepStackConfig`.
            image_token: The placeholder of an image in a prompt.
            **kwargs: What transformers adds.
        """
        self.patch_size = patch_size
        self.context = context
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def num_image_tokens(self, grid: Grid) -> int:
        """Number of tokens that an image with this grid takes in the sequence."""
        side, (columns, rows) = self.image_processor.view_size // self.patch_size, grid
        if self.context == "mosaic":
            return side * side + rows * side * (columns * side + 1)
        if self.context == "sequence":
            return side * side * (1 + columns * rows)
        return side * side

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What takes the place of an image's placeholder in a prompt: one placeholder for each token of the image.

        Args:
            image_inputs: What the image processor made of all images.
            image_idx: The image's number among them.
            **kwargs: Not used.

        Returns:
            The text.
        """
        columns, rows = image_inputs["image_grids"][image_idx]
        return self.image_token * self.num_image_tokens((int(columns), int(rows)))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Number of tokens and of views of images, from their (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.pick_grid(width, height) for height, width in image_sizes]
        per_view = {"global": 0, "crops": 1, "high_res": 1 + HIGH_RES_SIDE**2}[self.image_processor.views]
        views = [(1 + math.prod(grid)) * per_view or 1 for grid in grids]
        return MultiModalData(num_image_tokens=[self.num_image_tokens(grid) for grid in grids], num_image_patches=views)
