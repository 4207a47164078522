"""The tables of traits: whole, asked for properties only, and able to read what earlier releases called otherwise."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_deepstack.checkpoint.content.identity import identity, require_same
from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.load import load_recipe, recipe_to_yaml
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, Recipe, VisionConfig
from megatron_deepstack.config.sizes import head_width, num_kv_heads, used_layers
from megatron_deepstack.config.traits.families import FAMILIES, family_of
from megatron_deepstack.config.traits.towers import TOWERS, tower_of
from megatron_deepstack.config.traits.variants import VARIANTS, ViewLayout, variant_of_views
from megatron_deepstack.errors import CheckpointError, ConfigError
from megatron_deepstack.planning.exchange.rows import NEWLINE, image_rows
from megatron_deepstack.planning.exchange.samplers import SAMPLERS, sample_mosaic, stack_of_token
from megatron_deepstack.planning.views import ImageShape, TileGrid, ViewGrid
from megatron_deepstack.testing.oracle.stacks import sample_stacks

PACKAGES = ("megatron_deepstack", "orchestration", "tools")
ROOT = Path(__file__).parents[2]
KNOWS_VARIANTS = (
    "megatron_deepstack/config/traits/variants.py",  # the table
    "megatron_deepstack/config/schema",  # a default
    "megatron_deepstack/testing/",  # the oracle shares nothing with what it checks
    "tools/bench_",  # benchmarks compare models by name
)


def named_members(file: Path, enum: str) -> list[int]:
    """Lines on which a member of an enum is named."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == enum
    ]


def test_nothing_but_the_table_asks_for_a_variants_name() -> None:
    found = []
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(KNOWS_VARIANTS):
            found += [f"{name}:{line}" for line in named_members(file, "Variant")]
    assert not found, f"ask a trait of `config.traits.variants` instead: {found}"


def test_every_variant_and_sampler_has_a_row() -> None:
    assert set(VARIANTS) == set(Variant)
    assert set(SAMPLERS) == set(Sampler)
    assert [variant_of_views(views) for views in ViewLayout] == [
        "llava",
        "deepstack_l",
        "deepstack_hd",
        "granite4_vision",
        "qwen3_vl",
    ]


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("grid", [(2, 2), (3, 1), (1, 4)])
def test_a_sampler_gives_every_token_once(sampler: Sampler, grid: tuple[int, int]) -> None:
    gw, gh = grid
    crop, token = sample_mosaic(sampler, 4, grid)
    assert crop.shape == token.shape == (gw * gh, 16)
    assert sorted(zip(crop.flat, token.flat, strict=True)) == [(c, t) for c in range(gw * gh) for t in range(16)]
    pixels = torch.arange(gw * gh * 16).reshape(gw * gh, 16, 1)
    for stack, expected in enumerate(sample_stacks(pixels, grid, sampler)):  # the oracle's, written with tensors
        assert pixels[crop[stack], token[stack]].tolist() == expected.tolist()
    taken = stack_of_token(sampler, 4, grid)
    assert np.bincount(taken.flat).tolist() == [16] * (gw * gh)


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("grid", [(2, 2), (3, 1)])
def test_a_variant_uses_a_token_once(variant: Variant, grid: tuple[int, int]) -> None:
    """The newline aside, a token stands in the context or in one stack: its gradient comes back from one place."""
    shape: ImageShape = ViewGrid(1, *grid) if variant.traits.is_native else grid
    if variant.traits.views is ViewLayout.TILES:
        shape = TileGrid(*grid, 100, 70)
    vision = VisionConfig(image_size=32, patch_size=4, taps=(1, 2))
    rows = image_rows(ModelConfig(variant=variant, vision=vision), shape)
    used = [pair for pair in zip(rows.view.tolist(), rows.token.tolist(), strict=True) if pair[0] != NEWLINE]
    assert len(used) == len(set(used))


@pytest.mark.parametrize(
    ("switches", "family"),
    [
        ({}, FAMILIES["llama"]),
        ({"qkv_bias": True}, FAMILIES["qwen2"]),
        ({"qk_norm": True}, FAMILIES["qwen3"]),
        ({"family": "mistral"}, FAMILIES["mistral"]),
    ],
)
def test_a_family_is_recognised_by_its_switches(switches: dict, family: object) -> None:
    assert family_of(LanguageConfig(**switches)) == family


def test_switches_of_no_family_have_no_name_at_hugging_face() -> None:
    assert family_of(LanguageConfig(qkv_bias=True, qk_norm=True)).hugging_face is None


def test_unknown_names_are_errors_wherever_they_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"model.vision.kind: found 'clop', expected one of clip, siglip"):
        tower_of(VisionConfig(kind="clop"))
    with pytest.raises(ConfigError, match=r"model.language.family: found 'lama', expected one of llama"):
        family_of(LanguageConfig(family="lama"))


@pytest.mark.parametrize(
    ("select_layer", "used"), [(-1, 24), (-2, 23), (-24, 1), (1, 1), (24, 24)], ids=lambda value: str(value)
)
def test_used_layers(select_layer: int, used: int) -> None:
    assert used_layers(VisionConfig(num_layers=24, select_layer=select_layer)) == used


def test_heads_are_derived_where_a_recipe_leaves_them_out() -> None:
    language = LanguageConfig(hidden_size=64, num_heads=8)
    assert (head_width(language), num_kv_heads(language)) == (8, 8)
    language = replace(language, head_dim=16, num_kv_heads=2)
    assert (head_width(language), num_kv_heads(language)) == (16, 2)


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(("class_token", "kind"), [("true", "clip"), ("false", "siglip")])
def test_class_token_of_earlier_recipes_is_read(tmp_path: Path, class_token: str, kind: str) -> None:
    """As a run of an earlier release wrote it, and as an override."""
    recipe = Recipe(model=ModelConfig(vision=VisionConfig(kind=kind)))
    old = recipe_to_yaml(recipe).replace(f"kind: {kind}", f"class_token: {class_token}")
    old = old.replace("    family: null\n", "")
    assert "kind:" not in old
    assert load_recipe(written(tmp_path, old)) == recipe
    short = written(tmp_path, "model:\n  vision:\n    num_layers: 24\n")
    assert load_recipe(short, [f"model.vision.class_token={class_token}"]).model.vision.kind == kind
    both = [f"model.vision.kind={kind}", f"model.vision.class_token={class_token}"]
    assert load_recipe(short, both).model.vision.kind == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class_token: 1", "class_token: found 1, expected true or false; today's name is model.vision.kind"),
        ("{class_token: false, kind: clip}", "is false, which is the earlier name of model.vision.kind: siglip, and"),
    ],
)
def test_class_token_that_cannot_be_read_is_said(tmp_path: Path, text: str, message: str) -> None:
    section = text if text.startswith("{") else f"{{{text}}}"
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path, f"model:\n  vision: {section}\n"))


def test_checkpoints_of_earlier_releases_are_resumed() -> None:
    """Their identity says class_token, and no family; another tower is still another run."""
    recipe = Recipe()
    ours = identity(recipe, plan_hash="p", tokenizer_sha256="t")
    vision = {key: value for key, value in ours["model"]["vision"].items() if key != "kind"}
    language = {key: value for key, value in ours["model"]["language"].items() if key != "family"}
    old = {**ours, "model": {**ours["model"], "vision": {**vision, "class_token": True}, "language": language}}
    require_same(Path("step"), old, ours)
    named = replace(recipe, model=replace(recipe.model, language=LanguageConfig(family="llama")))
    require_same(Path("step"), old, identity(named, plan_hash="p", tokenizer_sha256="t"))
    old["model"]["vision"]["class_token"] = False
    with pytest.raises(CheckpointError, match=r"model.vision.kind: 'siglip' in the checkpoint, 'clip' in the recipe"):
        require_same(Path("step"), old, ours)


def test_towers_say_what_their_features_leave_out() -> None:
    assert {kind: TOWERS[kind].num_leading_tokens for kind in ("clip", "siglip")} == {"clip": 1, "siglip": 0}
