"""Grids and numbers of views, as published."""

import pytest

from megatron_deepstack.config.choices import GridRule, Variant
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.views import (
    ViewLayout,
    best_grid,
    candidate_grids,
    layout_of,
    most_views,
    num_views,
    pick_grid,
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


@pytest.mark.parametrize(("variant", "views"), [(v, n) for v, n in zip(Variant, (5, 5, 25, 1, 5, 5), strict=True)])
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
