"""`store show`: one HTML page of a store's samples that needs no network and no script.

For each image it shows the global view with the grid drawn over it, the crops, and the crops' tokens in the colours of
their stacks. For each text it shows what is learned and what is not. Texts and paths are escaped, and the page's own
security policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from megatron_deepstack import __version__
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.sizes import resampled_side
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.stored import Sample, StoredImage
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import Grid, TileGrid, ViewGrid, ViewLayout, num_views
from megatron_deepstack.platform.files.write_whole import write_result
from megatron_deepstack.report.drawing.svg import Markup, element, joined, stack_colour
from megatron_deepstack.report.pictures import embedded
from megatron_deepstack.storekeeping.stack_map import NO_STACK, mosaics, slot_names, stack_maps

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SIDE: Final = 420
"""Pixels along the longer side of an embedded picture."""
_FIGURE_SIDE: Final = 300
"""Pixels along its longer side on the page."""


def write_page(
    file: Path,
    store: Store,
    model: ModelConfig,
    samples: Sequence[int],
    tokenizer: Tokenizer | None,
    *,
    slots_known: bool = True,
) -> None:
    """Write the page about some samples.

    Args:
        file: Where the page is written.
        store: The store.
        model: The model that is assumed to read it.
        samples: Numbers of the samples.
        tokenizer: Turns tokens into text; without it, token ids are shown.
        slots_known: Whether the model is a recipe's. Otherwise it was guessed from the store, which does not record
            slots.

    Raises:
        StoreError: A view is damaged.
        DataError: The file cannot be written.
    """
    try:
        write_result(file, page(store, model, samples, tokenizer, slots_known=slots_known))
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror or error}") from error


def page(
    store: Store,
    model: ModelConfig,
    samples: Sequence[int],
    tokenizer: Tokenizer | None,
    *,
    slots_known: bool = True,
) -> str:
    """The page's HTML.

    Args:
        store: The store.
        model: The model that is assumed to read it.
        samples: Numbers of the samples to show, from 0, in the order of the page.
        tokenizer: The store's tokenizer; without it the page shows token numbers.
        slots_known: Whether the slots are those of a recipe; if not, the page does not name layers.

    Returns:
        The whole document as text.
    """
    lengths = expanded_lengths(store, model)
    sections = [_sample(store, model, number, int(lengths[number]), tokenizer) for number in samples]
    body = element(
        "main",
        element("h1", store.name),
        element("p", f"{len(samples)} of {len(store):,} samples, as {model.variant} reads them"),
        element("p", _advice(tokenizer, model)),
        _legend(model, slots_known),
        *sections,
        element("footer", f"megatron-deepstack {__version__}"),
    )
    folder = files("megatron_deepstack.report")
    style = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "samples.css"))
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{store.name} - samples"),
        element("style", Markup(style)),
    )
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en") + "\n"


def _advice(tokenizer: Tokenizer | None, model: ModelConfig) -> str:
    shown = "Green text is learned." if tokenizer else "Green tokens are learned; --tokenizer turns them into text."
    if model.variant.traits.is_native:
        return f"{shown} Each image is shown as the one view that the model sees."
    if model.variant.traits.views is ViewLayout.TILES:
        return f"{shown} Each image is shown as a whole, and as the padded tiles that the model sees beside it."
    return (
        f"{shown} A picture under the pointer, or touched, is shown without its stacks' colours. Yellow lines on a "
        "global view are the borders of its crops."
    )


def _legend(model: ModelConfig, slots_known: bool) -> Markup:
    """The stacks' colours, and before which layers they are added, if that is known."""
    from_taps = model.variant.traits.stack_source is StackSource.TAPS
    names = _tap_names(model) if from_taps else []
    if not from_taps and stack_maps(model, (2, 2)):
        names = [f"added before {name}" for name in slot_names(model)]
    items = [
        element(
            "span",
            element("i", style=f"background: {stack_colour(k)}"),
            f"stack {k}, {name}" if slots_known else f"stack {k}",
        )
        for k, name in enumerate(names)
    ]
    if names and not slots_known:
        items.append(element("span", "--recipe says before which layers they are added"))
    return element("p", *items, class_="legend")


def _tap_names(model: ModelConfig) -> list[str]:
    """Where each stack of a tapped layer comes from, and where it goes; every token of a view has all of them."""
    taps = model.vision.taps
    pairs = zip(sorted(taps) if model.variant.traits.is_native else taps, slot_names(model), strict=True)
    return [f"from the output of ViT layer {tap}, added before {name}" for tap, name in pairs]


def _sample(store: Store, model: ModelConfig, number: int, length: int, tokenizer: Tokenizer | None) -> Markup:
    sample = store.sample(number)
    facts = (
        f"sample {number}",
        f"{len(sample.tokens) - len(sample.images)} text tokens, {int(sample.loss_mask.sum())} of them learned",
        f"{length} with {len(sample.images)} image{'' if len(sample.images) == 1 else 's'}",
    )
    return element(
        "section",
        element("header", element("b", sample.id), *(element("span", fact) for fact in facts)),
        *(_image(store, model, image) for image in sample.images),
        element("p", *_text(sample, tokenizer), class_="text"),
        class_="sample",
    )


def _image(store: Store, model: ModelConfig, number: int) -> Markup:
    """The global view with the grid, and each mosaic with its stacks; of a view of any size its pictures."""
    image = store.image(number)
    if isinstance(image.grid, ViewGrid):
        return _native_image(store, model, number, image, image.grid)
    if isinstance(image.grid, TileGrid):
        return _tiled_image(store, model, number, image, image.grid)
    views = store.read_views(number, range(num_views(model.variant, image.grid)))
    maps = stack_maps(model, image.grid)
    figures = [_figure(embedded(views[0], "global view"), _grid_lines(model, image.grid), _caption(image), (1, 1))]
    for k, (caption, numbers) in enumerate(mosaics(model, image.grid)):
        picture, colours = embedded(_assembled(views, numbers), caption, _SIDE), _stack_colours(maps, numbers)
        if k == 0 and colours:
            figures.append(_figure(picture, Markup(""), caption, numbers.shape))
            caption = "their tokens by stack"
        figures.append(_figure(picture, colours, caption, numbers.shape))
    return element("div", *figures, class_="image")


def _native_image(store: Store, model: ModelConfig, number: int, image: StoredImage, grid: ViewGrid) -> Markup:
    """The pictures of a view of any size, in their shape."""
    view = store.read_whole([number])[0]
    _, height, width, _ = view.shape
    tokens = grid.num_tokens(model.vision.merge_size)
    caption = f"{_caption(image)}; the view has {width} x {height} and {tokens} tokens"
    figures = [_figure(embedded(frame, "view", _SIDE), Markup(""), caption, (height, width)) for frame in view]
    return element("div", *figures, class_="image")


def _tiled_image(store: Store, model: ModelConfig, number: int, image: StoredImage, tiles: TileGrid) -> Markup:
    """The whole image as the tower sees it, and the padded tiles."""
    views, side = store.read_views(number, range(image.count)), resampled_side(model)
    numbers = 1 + np.arange(tiles.columns * tiles.rows).reshape(tiles.rows, tiles.columns)
    lines, columns = tiles.unpadded(side)
    used = f"{len(lines)} lines of {len(columns)} tokens and a newline are used, {tiles.num_tokens(side)} in all"
    caption = f"{tiles.columns} x {tiles.rows} tiles; {used}"
    whole = _figure(embedded(views[0], "whole image"), Markup(""), _caption(image), (1, 1))
    mosaic = _figure(embedded(_assembled(views, numbers), "tiles", _SIDE), Markup(""), caption, numbers.shape)
    return element("div", whole, mosaic, class_="image")


def _caption(image: StoredImage) -> str:
    damage = "; flagged, see quarantine.jsonl" if image.status else ""
    return f"{image.path}, {image.size[0]} x {image.size[1]} pixels{damage}"


def _figure(picture: Markup, overlay: Markup, caption: str, shape: tuple[int, ...]) -> Markup:
    """A picture with its caption; `shape` is its rows and columns of views. The longer side is equal for all."""
    num_rows, num_columns = shape
    width = _FIGURE_SIDE * num_columns / max(num_rows, num_columns)
    frame = element("div", picture, overlay, class_="frame", style=f"max-width: {width:.0f}px")
    return element("figure", frame, element("figcaption", caption))


def _grid_lines(model: ModelConfig, grid: Grid) -> Markup:
    if not mosaics(model, grid):
        return Markup("")
    gw, gh = grid
    style = f"grid-template: repeat({gh}, 1fr) / repeat({gw}, 1fr)"
    return element("div", *([element("i")] * (gw * gh)), class_="lines", style=style)


def _assembled(arrays: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Arrays (N, h, w, ...) put together as their numbers (rows, columns) say."""
    return np.concatenate([np.concatenate(list(arrays[row]), axis=1) for row in numbers], axis=0)


def _stack_colours(maps: dict[int, np.ndarray], numbers: np.ndarray) -> Markup:
    """One pixel for each token, in the colour of its stack; transparent for tokens without a stack."""
    found = {number: maps[number] for number in numbers.flat if number in maps}
    if not found:
        return Markup("")
    none = np.full_like(next(iter(found.values())), NO_STACK)
    largest = int(numbers.max())
    stacks = _assembled(np.stack([found.get(number, none) for number in range(largest + 1)]), numbers)
    pixels = np.zeros((*stacks.shape, 4), np.uint8)
    for stack in np.unique(stacks[stacks != NO_STACK]).tolist():
        colour = stack_colour(stack).lstrip("#")
        pixels[stacks == stack] = (*bytes.fromhex(colour), 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return element("img", src=source, alt="tokens by stack", class_="stacks")


def _text(sample: Sample, tokenizer: Tokenizer | None) -> Iterator[Markup]:
    """The sample's tokens as text, piece by piece: learned, not learned, a placeholder, a control token."""
    image = 0
    for first, last, kind in _stretches(sample, tokenizer):
        if kind == "image":
            image += 1
            yield element("kbd", f"image {image}")
            continue
        shown = _words(sample.tokens, first, last, tokenizer)
        content = element("kbd", kind, class_="control") if kind in ("bos", "eos") else joined(shown)
        yield element("mark", content) if sample.loss_mask[first] else content


def _stretches(sample: Sample, tokenizer: Tokenizer | None) -> Iterator[tuple[int, int, str]]:
    """First and last token (exclusive) and kind of each piece; each image or control token is a piece of its own."""
    control = {} if tokenizer is None else {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos"}
    kinds = ["image" if t == IMAGE_TOKEN_ID else control.get(t, "text") for t in sample.tokens.tolist()]
    mask = sample.loss_mask.tolist()
    first = 0
    for last in range(1, len(kinds) + 1):
        same = last < len(kinds) and kinds[first] == "text" == kinds[last] and mask[last] == mask[first]
        if not same:
            yield first, last, kinds[first]
            first = last


def _words(tokens: np.ndarray, first: int, last: int, tokenizer: Tokenizer | None) -> str:
    """The text of a piece, with the spaces it has in its context; token ids if there is no tokenizer."""
    if tokenizer is None:
        return " ".join(str(token) for token in tokens[first:last].tolist()) + " "
    before, through = (tokenizer.decode(tokens[:end].tolist()) for end in (first, last))
    return through[len(before) :] if through.startswith(before) else tokenizer.decode(tokens[first:last].tolist())
