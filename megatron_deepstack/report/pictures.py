"""Views of held-out images as they are in the store, embedded in the page: the global view, and the crops as a grid."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.errors import DeepStackError
from megatron_deepstack.planning.views import TileGrid, ViewGrid
from megatron_deepstack.platform.quantity import number_of
from megatron_deepstack.report.drawing.svg import Markup, element

_MAX_SIDE = 336
"""Pixels; larger views are scaled down to this, to keep the page small."""

_GRID_SIDE = 260
"""Pixels on the page along the longer side of a grid of crops; a global view is half as wide (style.css)."""


class Pictures:
    """Opens each store once. Pictures that cannot be shown are left out; `told` gives their number and the reason."""

    def __init__(self) -> None:
        self._open: dict[str, Store | DeepStackError | OSError] = {}
        """By path or URL, the store, or the error of opening it: a service that does not answer is not asked again."""
        self._absent: dict[str, list[str]] = {}
        """By store, the reason for each picture that is missing."""

    def views(self, store: str, image: int) -> Markup:
        """The views of an image.

        Args:
            store: Folder or URL of its store.
            image: Its number in the store.

        Returns:
            The global view, and beside it the crops as a grid if the store has any; a few words if reading fails.
        """
        try:
            return self._views(self._opened(store), image)
        except (DeepStackError, OSError, IndexError) as error:
            self._absent.setdefault(store, []).append(str(error).splitlines()[0])
            return element("p", "no picture", class_="absent")

    def global_view(self, store: str, image: int, max_side: int) -> Markup:
        """The global view of an image alone, or the first frame of its one view where views have any size.

        Args:
            store: Folder or URL of its store.
            image: Its number in the store.
            max_side: Longest side in pixels.

        Returns:
            The view; a few words if reading fails.
        """
        try:
            opened = self._opened(store)
            if isinstance(opened.image(image).grid, ViewGrid):
                return embedded(opened.read_whole([image])[0][0], "view", max_side)
            return embedded(opened.read_views(image, (0,))[0], "global view", max_side)
        except (DeepStackError, OSError, IndexError) as error:
            self._absent.setdefault(store, []).append(str(error).splitlines()[0])
            return element("p", "no picture", class_="absent")

    def told(self) -> list[str]:
        """A line for each store of which pictures have been missing since the last call."""
        absent, self._absent = self._absent, {}
        return [
            f"no picture for {number_of(len(reasons), 'answer')} from {store}: {reasons[0]}"
            for store, reasons in sorted(absent.items())
        ]

    def _opened(self, store: str) -> Store:
        if store not in self._open:
            try:
                self._open[store] = Store.open(store)
            except (DeepStackError, OSError) as error:
                self._open[store] = error
        found = self._open[store]
        if isinstance(found, Exception):
            raise found
        return found

    def _views(self, opened: Store, image: int) -> Markup:
        stored = opened.image(image)
        if isinstance(stored.grid, ViewGrid):
            frames = [embedded(frame, "view") for frame in opened.read_whole([image])[0]]
            return element("div", *(element("figure", one) for one in frames), class_="views")
        tiled = isinstance(stored.grid, TileGrid)
        gw, gh = (stored.grid.columns, stored.grid.rows) if isinstance(stored.grid, TileGrid) else stored.grid
        views = opened.read_views(image, range(min(stored.count, 1 + gw * gh)))
        figures = [element("figure", embedded(views[0], "global view"), element("figcaption", "global view"))]
        if len(views) > 1:
            word = "tile" if tiled else "crop"
            crops = [embedded(view, f"{word} {index}") for index, view in enumerate(views[1:])]
            grid = element("div", *crops, class_="grid", style=_grid_style(gw, gh))
            figures.append(element("figure", grid, element("figcaption", f"{gw} x {gh} {word}s")))
        return element("div", *figures, class_="views")


def _grid_style(gw: int, gh: int) -> str:
    """Columns of such a width that the longer side of the grid is equal for all grids."""
    side = _GRID_SIDE / max(gw, gh)
    return f"grid-template-columns: repeat({gw}, {side:.0f}px)"


def embedded(pixels: np.ndarray, alt: str, max_side: int = _MAX_SIDE) -> Markup:
    """An image as an `<img>` element that holds its bytes.

    Args:
        pixels: uint8 (H, W, 3).
        alt: Its description.
        max_side: Longest side in pixels; larger images are scaled down.

    Returns:
        The element.
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((max_side, max_side))
    return element("img", src=_data_uri(picture), alt=alt, width=picture.width, height=picture.height)


def _data_uri(picture: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller; PNG usually is for drawings."""
    candidates: Sequence[tuple[str, dict[str, object]]] = (("png", {"optimize": True}), ("jpeg", {"quality": 85}))
    encoded = []
    for kind, options in candidates:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
