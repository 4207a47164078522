"""The guides in docs/extending: their examples, taken from the pages, work with the code as it is.

Changes of files are applied to a copy of the packages, and processes of their own look at what comes of it. Rows of
towers and families are executed here, since a program of one's own would do the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, text_of

from megatron_deepstack.config.load import load_recipe
from megatron_deepstack.config.traits.families import FAMILIES, family_of
from megatron_deepstack.config.traits.installed import GROUP
from megatron_deepstack.config.traits.towers import TOWERS, tower_of
from megatron_deepstack.planning.check import check_plan
from megatron_deepstack.testing.tiny_data import record, write_records

GUIDES = ROOT / "docs" / "extending"


def examples(language: str, page: str) -> list[str]:
    """Code blocks of a guide, without the indentation of the list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text_of(GUIDES / page), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def changed(text: str, hunk: list[str], where: str) -> str:
    """The text after one part of a diff. The lines that it finds there must stand in the text exactly once."""
    before = "".join(line[1:] + "\n" for line in hunk if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in hunk if line[0] in " +")
    assert text.count(before) == 1, f"{where} holds {text.count(before)} times, expected once:\n{before}"
    return text.replace(before, after)


def apply(page: str, root: Path) -> None:
    """Make the changes that a guide shows: its diffs, and its files, whose first line is their path."""
    for block in examples("diff", page):
        head, *lines = block.splitlines()
        file = root / head.removeprefix("+++ ")
        for hunk in "\n".join(lines).split("\n@@\n"):
            marked = [line or " " for line in hunk.splitlines()]
            file.write_text(changed(file.read_text(encoding="utf-8"), marked, f"{page}: {file.relative_to(root)}"))
    for block in examples("python", page):
        if re.match(r"# \S+\.py\n", block):
            path, content = block.removeprefix("# ").split("\n", 1)
            (root / path).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the changes of all guides."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("megatron_deepstack", "orchestration"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for page in ("sampler.md", "variant.md", "verb.md"):
        apply(page, root)
    return root


def in_copy(copy: Path, *words: str) -> str:
    """What a Python process prints that sees the copy; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ORACLE = """
import torch
from megatron_deepstack.config.choices import Sampler, Variant
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.planning.exchange.rows import BASE, image_rows
from megatron_deepstack.planning.exchange.samplers import sample_mosaic
from megatron_deepstack.testing.oracle import model as oracle
from megatron_deepstack.testing.oracle.stacks import sample_stacks

for grid in ((2, 2), (3, 1), (1, 4)):
    count = grid[0] * grid[1]
    crops = torch.arange(count * 16).reshape(count, 16, 1)
    crop, token = sample_mosaic(Sampler.COLUMNS, 4, grid)
    assert sorted(crops[crop, token].flatten().tolist()) == list(range(count * 16))
    for stack, expected in enumerate(sample_stacks(crops, grid, Sampler.COLUMNS)):
        assert crops[crop[stack], token[stack]].equal(expected)
print("sampler")

model = ModelConfig(
    variant=Variant.DEEPSTACK_HD_SHORT,
    vision=VisionConfig(image_size=16, patch_size=4),
    stacks=StackConfig(sampler=Sampler.COLUMNS),
)
for grid in ((2, 2), (3, 1)):
    views = torch.randn(oracle.stacks.num_views_of_image(model.variant, grid), 16, 8)
    oracle.vision.encode_views = oracle.vision.project = lambda *_: views
    base, stacks = oracle.image_rows(model, {}, views, grid)
    rows = image_rows(model, grid)
    found = torch.zeros(1 + len(stacks), rows.context_length, 8)
    found[rows.stack - BASE, rows.cell] = views[rows.view, rows.token]
    assert len(base) == oracle.num_rows_of_image(model, grid) == rows.context_length
    assert found.equal(torch.stack([base, *stacks]))
print("variant")
"""
"""The sampler and the variant of the guides against their own lines of the oracle."""


def test_sampler_and_variant_agree_with_the_oracle(copy: Path) -> None:
    assert in_copy(copy, "-c", ORACLE).split() == ["sampler", "variant"]


def test_a_recipe_names_them(copy: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "plan.svg"
    words = ("model.variant=deepstack_hd_short", "model.stacks.sampler=columns")
    in_copy(copy, "-m", "megatron_deepstack.cli", "plan", "demo", *words, "--svg", str(drawn))
    assert "by columns" in drawn.read_text(encoding="utf-8")


def test_the_verb_works(copy: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "records.json", [record(1, ["a.jpg"]), record(2, ["a.jpg", "b.jpg"]), record(3, [])])
    sources = (f"data.records={tmp_path / 'records.json'}", f"data.images={tmp_path}")
    assert in_copy(copy, "-m", "megatron_deepstack.cli", "count", "demo", *sources) == "2 images\n"
    listed = in_copy(copy, "-m", "megatron_deepstack.cli", "--help")
    assert listed.index("draw") < listed.index("count") < listed.index("preprocess")


def new_parts() -> Any:
    """tests/extending/new_parts.py, which tests of its own take through the whole system."""
    spec = importlib.util.spec_from_file_location("new_parts_of_the_guides", ROOT / "tests/extending/new_parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "name"), [("tower.md", "VIT"), ("family.md", "BIASED")])
def test_rows_are_those_that_are_tested(page: str, name: str) -> None:
    """Executed as they stand, which registers them; the same rows are compared with transformers elsewhere."""
    (block,) = examples("python", page)
    names: dict[str, Any] = {}
    exec(block, names)
    row = getattr(new_parts(), name)
    assert names[name] == row
    assert row in (*TOWERS.values(), *FAMILIES.values())


def test_the_recipes_of_the_guides_are_sound(tmp_path: Path) -> None:
    parts = new_parts()
    parts.register()
    for page in ("tower.md", "family.md"):
        (recipe,) = examples("yaml", page)
        (tmp_path / page).write_text(recipe)
        model = load_recipe(tmp_path / page).model
        check_plan(load_recipe(tmp_path / page))
        assert tower_of(model.vision) == parts.VIT or family_of(model.language) == parts.BIASED


@pytest.mark.parametrize("page", ["tower.md", "family.md"])
def test_the_entry_point_is_the_one_that_is_read(page: str) -> None:
    (block,) = examples("toml", page)
    assert list(tomllib.loads(block)["project"]["entry-points"]) == [GROUP]


@pytest.mark.parametrize(
    "page", [*sorted(GUIDES.glob("*.md")), ROOT / "docs" / "architecture.md"], ids=lambda page: page.name
)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Below the repository or the package; files that an example makes or assumes are none of these."""
    made = {"orchestration/preprocess/count.py"}
    named = set(re.findall(r"(?<![\w./])((?:\w+/)+\w+(?:\.py)?)(?=[`, ])", text_of(page))) - made
    lost = [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "megatron_deepstack"))]
    assert not lost, f"{page.name} names what is not there: {lost}"


def test_a_guide_for_each() -> None:
    """The table lists every guide, with the number of files to touch."""
    rows = re.findall(r"^\| an? (.+?) \| (\d) \| .*\]\((\w+\.md)\) \|$", text_of(GUIDES / "README.md"), re.MULTILINE)
    assert {page for _, _, page in rows} == {page.name for page in GUIDES.glob("*.md")} - {"README.md"}
    for _, number, page in rows:
        touched = {block.split("\n", 1)[0] for block in examples("diff", page)}
        touched |= {block.split("\n", 1)[0] for block in examples("python", page) if block.startswith("# ")}
        assert len(touched) <= int(number)
