"""The report: what it reads from a run folder, that text stays text, and that it asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_deepstack.config.choices import Variant
from megatron_deepstack.config.load import recipe_to_yaml
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, Recipe, StackConfig
from megatron_deepstack.errors import ConfigError, DataError, LocationError, StoreError
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.report import pictures
from megatron_deepstack.report.drawing.stages import stage_drawing
from megatron_deepstack.report.page import write_report
from megatron_deepstack.report.records import read_metrics
from megatron_deepstack.run_folder.answers import read_answers
from megatron_deepstack.testing.tiny_mixed import write_tiny_mixed
from megatron_deepstack.testing.tiny_store import write_tiny_store

HOSTILE = "<script>alert('x')</script>\"&"


class FakeStore:
    """Two images: a 2x2 grid and a 1x3 grid."""

    @classmethod
    def open(cls, path: str) -> FakeStore:
        assert path == "somewhere.zarr"
        return cls()

    def image(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(grid=[(2, 2), (1, 3)][index], count=[5, 4][index])

    def read_views(self, image: int, views: range) -> np.ndarray:
        return np.full((len(views), 28, 28, 3), 40 * image, np.uint8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pictures, "Store", FakeStore)
    model = ModelConfig(language=LanguageConfig(num_layers=8), stacks=StackConfig(slots=(0, 3, 5, 7)))
    recipe = Recipe(name=HOSTILE, model=model, parallel=ParallelConfig(pipeline=2))
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    steps = [1, 2, 3, 4, 3, 4, 5]
    records = [
        {"step": step, "loss": 4.0 / step, "lr": 1e-3, "tokens_per_second": 1e3, "step_seconds": 2} for step in steps
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "lo'
    )
    answers = [
        {"id": "a", "question": HOSTILE, "answer": "7", "expected": "7", "correct": True, "image": 0},
        {"id": "b", "question": "Word?", "answer": HOSTILE, "expected": "dog", "correct": False, "image": 1},
        {"id": "c", "question": "Text only?", "answer": "no", "expected": "yes", "correct": False, "image": None},
    ]
    lines = [json.dumps({**answer, "store": "somewhere.zarr"}) for answer in answers]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


class Tags(HTMLParser):
    """Names, attributes and texts of a page; asserts that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "img":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_what_the_run_did(run):
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    texts = " | ".join(page.texts)
    for words in (
        "5 / 1000",
        "answers exactly right (33.3%; the commonest answer every time: 33.3%)",
        "resumed",
        "stack 3",
        "slot 7",
        "0, 3, 5, 7",
        "10.0 s",
    ):
        assert words in texts
    for words in ("2 x 2 crops", "1 x 3 crops", "right: 1", "wrong: 2", "dog"):
        assert words in texts
    assert sum(tag == "img" for tag, _ in page.seen) == (1 + 4) + (1 + 3)


def test_text_from_data_and_model_stays_text(run):
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    # Heading, name in the recipe, and the question and the answer on their cards and in the table.
    assert page.texts.count(HOSTILE) == 6
    assert [HOSTILE in text for text in page.texts if "Bokeh" in text] == [False, False]


def scripts_of(text: str) -> list[str]:
    """Contents of the scripts that a browser runs."""
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


def test_the_page_asks_nothing_of_the_network(run):
    text = write_report(run).read_text(encoding="utf-8")
    for _, attributes in Tags(text).seen:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:image/"), (name, value)
    for script in scripts_of(text):
        text = text.replace(script, "")
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_the_page_its_own_scripts_by_their_hashes_and_nothing_else(run):
    text = write_report(run).read_text(encoding="utf-8")
    (policy,) = (found["content"] for tag, found in Tags(text).seen if found.get("http-equiv"))
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts_of(text)]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert len(hashes) == 2


def test_wrong_answers_come_first_and_all_are_in_a_table_that_sorts_and_filters(run):
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    assert page.texts.index("wrong: 2") < page.texts.index("right: 1")
    cards = [found["data-kind"] for tag, found in page.seen if tag == "article"]
    rows = [found["data-kind"] for tag, found in page.seen if tag == "tr" and "data-kind" in found]
    assert cards == rows == ["wrong", "wrong", "right"]
    assert "plain sortable" in [found.get("class") for tag, found in page.seen if tag == "table"]
    # What needs the script is hidden until the script shows it.
    assert [found for tag, found in page.seen if found.get("class") == "filter"] == [{"class": "filter", "hidden": ""}]


GONE = {
    "store that is gone": (StoreError("somewhere.zarr: not a store: it has no zarr.json"), "it has no zarr.json"),
    "bucket that is not reached": (LocationError("s3://b/x: cannot be reached"), "cannot be reached"),
    "store of other pictures": (IndexError("image 7 of 3"), "image 7 of 3"),
    "disk that fails": (OSError(5, "Input/output error"), "Input/output error"),
}


@pytest.mark.parametrize(("error", "words"), GONE.values(), ids=GONE)
def test_without_its_store_the_page_is_written_without_pictures_and_says_so(run, monkeypatch, error, words):
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(FakeStore, "open", fail)
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    (line,) = (text for text in page.texts if "no picture for" in text)
    assert line.startswith("no picture for 2 answers from somewhere.zarr: ")
    assert words in line
    assert page.texts.count("no picture") == 2
    assert "dog" in page.texts
    assert not [tag for tag, _ in page.seen if tag == "img"]


def test_one_damaged_picture_costs_no_other(run, monkeypatch):
    whole = FakeStore.read_views

    def damaged(self: FakeStore, image: int, views: range) -> np.ndarray:
        if image == 0:
            raise StoreError("view 0 of image 0 is damaged")
        return whole(self, image, views)

    monkeypatch.setattr(FakeStore, "read_views", damaged)
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    assert sum(tag == "img" for tag, _ in page.seen) == 1 + 3
    assert "no picture for 1 answer from somewhere.zarr: view 0 of image 0 is damaged" in page.texts


def test_answers_to_other_stores_have_sections_of_their_own(run):
    held_out = (run / "answers.jsonl").read_text()
    (run / "answers").mkdir()
    other = json.loads(held_out.splitlines()[2]) | {"store": "/data/cats.zarr"}
    (run / "answers" / "cats.zarr-12345678-first-1.jsonl").write_text(json.dumps(other) + "\n")
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    assert page.texts.index("Held-out questions") < page.texts.index("First 1 question of cats.zarr")
    assert "answers exactly right (33.3%; the commonest answer every time: 33.3%)" in page.texts


VIEWS = {
    ViewLayout.GLOBAL: (1, "global view"),
    ViewLayout.CROPS: (5, "global view2 x 2 crops"),
    ViewLayout.HIGH_RES: (5, "global view2 x 2 crops"),
}


@pytest.mark.parametrize(("layout", "shown"), VIEWS.items(), ids=VIEWS)
def test_pictures_of_every_layout_show_the_views_there_are(tmp_path, layout, shown):
    grids = [(1, 1) if layout is ViewLayout.GLOBAL else (2, 2)]
    store = write_tiny_store(tmp_path / "store", grids=grids, samples=[(0,)], layout=layout)
    page = Tags(pictures.Pictures().views(str(store), 0))
    assert (sum(tag == "img" for tag, _ in page.seen), "".join(page.texts)) == shown


def test_pictures_of_views_of_any_size(tmp_path):
    """A picture, and a pair of a video's frames, of which the small form shows the first."""
    store = str(write_tiny_mixed(tmp_path / "store"))
    for image, frames in ((0, 1), (2, 2)):
        shown = pictures.Pictures()
        assert sum(tag == "img" for tag, _ in Tags(shown.views(store, image)).seen) == frames
        assert sum(tag == "img" for tag, _ in Tags(shown.global_view(store, image, 40)).seen) == 1
        assert shown.told() == []


def test_a_run_without_answers_or_metrics_has_a_page_too(run):
    (run / "answers.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    page = Tags(write_report(run).read_text(encoding="utf-8"))
    assert any("None yet" in text for text in page.texts)
    assert any("no values were recorded" in text for text in page.texts)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        write_report(tmp_path)


def test_steps_run_twice_count_once(run):
    metrics = read_metrics(run)
    assert [step for step, _ in metrics.series("loss")] == [1, 2, 3, 4, 5]
    assert metrics.resumed_at == (3,)


def test_values_that_are_no_numbers_are_counted_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 1}\n'
    )
    metrics = read_metrics(tmp_path)
    assert metrics.series("loss") == [(3, 1)]
    assert metrics.num_not_finite("loss") == 2


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: is not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"id": 1, "question": "?"}\n')
    with pytest.raises(DataError, match="has no answer, expected, correct"):
        read_answers(tmp_path)


DRAWN = {
    "all on one stage": Recipe(),
    "no stacks": Recipe(model=ModelConfig(variant=Variant.LLAVA)),
    "stacks in the ViT": Recipe(model=ModelConfig(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=20))),
    "chunks": Recipe(parallel=ParallelConfig(pipeline=4, virtual_pipeline=4)),
    "one stack a layer": Recipe(model=ModelConfig(stacks=StackConfig(num_crops=32, slots=tuple(range(32))))),
    "a stage without layers": Recipe(parallel=ParallelConfig(pipeline=2, layers_per_stage=(0, 32))),
}


@pytest.mark.parametrize("recipe", DRAWN.values(), ids=DRAWN)
def test_drawings_are_xml_and_inside_their_box(recipe):
    root = ElementTree.fromstring(stage_drawing(recipe))
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    for part in root.iter():
        for name, limit in (("x", width), ("cx", width), ("y", height)):
            if name in part.attrib:
                assert 0 <= float(part.attrib[name]) <= limit, ElementTree.tostring(part)


def test_every_stack_is_drawn_to_the_cell_of_its_slot():
    slots = (7, 0, 3, 3)
    model = ModelConfig(language=LanguageConfig(num_layers=8), stacks=StackConfig(slots=slots))
    root = ElementTree.fromstring(stage_drawing(Recipe(model=model, parallel=ParallelConfig(pipeline=2))))
    paths = [part.attrib["d"] for part in root.iter() if part.tag.endswith("path") and " C" in part.attrib["d"]]
    ends = [float(path.replace(",", " ").split()[-2]) for path in paths[1:]]
    layers = {
        int(part.text): float(part.attrib["x"])
        for part in root.iter()
        if part.tag.endswith("text") and part.text.isdigit() and float(part.attrib["y"]) > 200
    }
    assert ends == pytest.approx([layers[slot] for slot in slots], abs=0.1)
