"""Grids and numbers of views, as published."""

import ast
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.errors import ConfigError, DataError
from megatron_deepstack.planning.views import (
    ViewGrid,
    ViewLayout,
    best_grid,
    candidate_grids,
    layout_of,
    most_views,
    num_views,
    pick_grid,
    smart_resize,
)


def test_candidates_are_in_the_published_order() -> None:
    assert candidate_grids(4) == ((1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def test_a_single_crop_is_no_grid() -> None:
    with pytest.raises(ConfigError, match="num_crops is 1: a grid needs at least 2 crops"):
        candidate_grids(1)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (336, 336, (1, 2)),  # published: a small square image is stretched to a column of two
        (100, 100, (1, 2)),
        (640, 480, (2, 2)),
        (480, 640, (2, 2)),
        (2000, 2000, (2, 2)),
        (1000, 300, (3, 1)),
        (1600, 400, (4, 1)),
        (1654, 2339, (2, 2)),
        (10, 5000, (1, 4)),
        (1, 5000, (1, 2)),  # published: fitted, its width rounds to 0, and no grid is better than another
        (5000, 1, (1, 2)),
        (1, 1, (1, 2)),
    ],
)
def test_best_grid(width: int, height: int, grid: tuple[int, int]) -> None:
    assert best_grid(width, height, 336, 4) == grid


@pytest.mark.parametrize(
    ("variant", "views"), [(v, n) for v, n in zip(Variant, (5, 5, 25, 1, 5, 5, 1, 1, 5), strict=True)]
)
def test_views_of_a_2x2_grid(variant: Variant, views: int) -> None:
    assert num_views(variant, (2, 2)) == views


def test_views_of_other_grids() -> None:
    assert num_views(Variant.DEEPSTACK_L, (3, 1)) == 4
    assert num_views(Variant.DEEPSTACK_HD, (3, 1)) == 20


def test_the_global_view_alone_needs_no_grid() -> None:
    assert most_views(ViewLayout.GLOBAL, GridRule.BEST_FIT, 1) == 1


def test_most_views_covers_every_candidate() -> None:
    for num_crops in (2, 4, 9, 12):
        for layout in ViewLayout:
            assert most_views(layout, GridRule.BEST_FIT, num_crops) == max(
                num_views(variant, grid)
                for variant in Variant
                if layout_of(variant) is layout
                for grid in candidate_grids(num_crops)
            )
    assert most_views(ViewLayout.CROPS, GridRule.FIXED_2X2, 9) == 5


def test_fixed_grid_ignores_the_image() -> None:
    assert pick_grid(GridRule.FIXED_2X2, 5000, 10, 336, 4) == (2, 2)


@cache
def published_smart_resize() -> Callable[..., tuple[int, int]]:
    """transformers' function from its source, since the module around it needs torchvision."""
    source = Path(find_spec("transformers").origin).parent / "models/qwen2_vl/image_processing_qwen2_vl.py"  # type: ignore[union-attr, arg-type]
    functions = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") == "smart_resize"]
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module(functions, []), str(source), "exec"), names)
    return names["smart_resize"]


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 480), (200, 150), (4000, 3000), (33, 31), (1, 1), (16, 3000), (6400, 33), (20000, 120), (47, 48), (80, 16)],
)
@pytest.mark.parametrize(("low", "high"), [(65536, 16777216), (1, 4096), (4096, 40000)])
def test_views_are_resized_as_published(width: int, height: int, low: int, high: int) -> None:
    theirs = published_smart_resize()(height, width, factor=32, min_pixels=low, max_pixels=high)
    assert smart_resize(width, height, multiple=32, min_pixels=low, max_pixels=high) == theirs[::-1]


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (0, 7, "an image of 0x7 pixels: it needs at least one pixel"),
        (4020, 20, "an image of 4020x20 pixels: its sides have a ratio of 201, and at most 200 is possible"),
    ],
    ids=["empty", "ratio"],
)
def test_an_image_without_a_size_is_refused(width: int, height: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        smart_resize(width, height, multiple=32, min_pixels=1, max_pixels=10**9)


def test_a_grid_counts_patches_and_tokens() -> None:
    grid = ViewGrid.of_pixels(96, 64, patch_size=16, merge_size=2)
    assert grid == ViewGrid(frames=1, height=4, width=6)
    assert (grid.num_patches, grid.num_tokens(2), grid.pixel_size(16)) == (24, 6, (96, 64))


@pytest.mark.parametrize(("width", "height"), [(0, 64), (16, 64), (96, 80)])
def test_a_view_of_another_size_is_refused(width: int, height: int) -> None:
    with pytest.raises(DataError, match=f"a view of {width}x{height} pixels: both sides must be positive multiples"):
        ViewGrid.of_pixels(width, height, patch_size=16, merge_size=2)
