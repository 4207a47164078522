"""What a job did not store as it is, is counted by its reason; options that keep it are part of the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import DeepGrey
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.store.quarantine import flagged_by_reason
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.conversation import encode_conversation
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import StoreError
from megatron_deepstack.storekeeping.choose import load
from megatron_deepstack.storekeeping.stats import statistics
from megatron_deepstack.testing.tiny_data import draw_photo, record, tiny_recipe, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

REASONS = {"deep grey": 2, "transparency": 1}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Four images, three of which Pillow's conversion to RGB ruins."""
    folder = tmp_path_factory.mktemp("losses")
    (folder / "photos").mkdir()
    grey = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    images = {
        "good.png": draw_photo(64, 64, 0),
        "grey.png": Image.fromarray(grey),
        "grey.tif": Image.fromarray(grey),
        "drawing.png": Image.new("RGBA", (64, 64)),
    }
    for name, image in images.items():
        image.save(folder / "photos" / name)
    items = [record(name, [name]) for name in images]
    items.append({"images": ["good.png"], "system": "Be brief.", "note": 1, "messages": [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat.", "loss": False},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "No."},
    ]})  # fmt: skip
    tiny = tiny_recipe()
    data = replace(
        tiny.data,
        records=(str(write_records(folder / "records.json", items)),),
        images=str(folder / "photos"),
        tokenizer=str(write_tokenizer(folder / "tiny.model")),
        ignore_keys=("note",),
    )
    return replace(tiny, data=data)


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the job said, with its store."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    command = ["preprocess", str(folder / "recipe.yaml"), f"data.store={folder / 'store'}", "--workers", "0"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    return folder / "store", said.output


def test_flags_are_counted_by_reason(made: Any) -> None:
    store, said = made
    assert "3 images flagged but stored (deep grey 2, transparency 1) (listed in" in said
    assert json.loads((store / "report.json").read_text())["flagged_by_reason"] == REASONS
    opened, model = load(str(store), None)
    assert flagged_by_reason(opened.location) == REASONS
    stats = statistics(opened, model)
    assert stats.flagged == REASONS
    assert dict(stats.facts)["flagged because of"].startswith("deep grey 2, transparency 1 (each is named in quar")
    printed = CliRunner().invoke(app, ["store", "stats", str(store)]).output
    assert "deep grey 2, transparency 1" in printed


def test_small_jobs_are_told_in_small_units(made: Any) -> None:
    assert " kB in " in made[1]


def test_system_texts_and_unlearned_answers_reach_the_store(made: Any, recipe: Recipe) -> None:
    store = Store.open(made[0])
    sample = store.sample(len(store) - 1)
    assert sample.id == "records.json:4"
    turns = [
        Turn(Role.SYSTEM, "Be brief."),
        Turn(Role.HUMAN, "<image>\nWhat is it?"),
        Turn(Role.GPT, "A cat.", learned=False),
        Turn(Role.HUMAN, "Sure?"),
        Turn(Role.GPT, "No."),
    ]
    tokens, mask = encode_conversation(turns, "v1", load_tokenizer(str(recipe.data.tokenizer)))
    np.testing.assert_array_equal(sample.tokens, tokens)
    np.testing.assert_array_equal(sample.loss_mask, mask)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"deep_grey": DeepGrey.SCALE}, "processor.deep_grey: as_published there, scale asked for"),
        ({"transparency": "#ffffff"}, "processor.transparency: as_published there, #ffffff asked for"),
        ({"ignore_keys": ("note", "system")}, r"ignore_keys: \['note'\] there, \['note', 'system'\] asked for"),
    ],
    ids=["deep_grey", "transparency", "ignore_keys"],
)
def test_a_job_does_not_go_on_with_other_settings(
    change: dict[str, Any], difference: str, made: Any, recipe: Recipe
) -> None:
    other = replace(recipe, data=replace(recipe.data, **change))
    with pytest.raises(StoreError, match=difference):
        preprocess(other, str(made[0]), workers=0)


def test_nothing_is_flagged_with_the_options_that_keep_it(recipe: Recipe, tmp_path: Path) -> None:
    kept = replace(recipe.data, deep_grey=DeepGrey.SCALE, transparency="#ffffff")
    done = preprocess(replace(recipe, data=kept), str(tmp_path / "store"), workers=0)
    assert (done.flagged, done.flagged_by_reason) == (0, {})
    store = Store.open(tmp_path / "store")
    by_path = {store.image(n).path: store.read_views(n, [0])[0] for n in range(store.num_images)}
    assert (by_path["drawing.png"] == 255).all()
    assert len(np.unique(by_path["grey.png"])) > 20
    np.testing.assert_array_equal(by_path["grey.png"], by_path["grey.tif"])
