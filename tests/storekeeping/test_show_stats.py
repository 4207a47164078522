"""`store show` and `store stats`: what they say is what is stored, text stays text, and nothing is fetched."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.config.choices import GridRule, Sampler, Variant
from megatron_deepstack.config.schema import ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.data.store.lengths import expanded_lengths
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.store.schema import shard_path
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError, StoreError
from megatron_deepstack.planning.exchange.rows import image_rows
from megatron_deepstack.planning.views import ViewLayout
from megatron_deepstack.storekeeping.choose import chosen, tokenizer_for
from megatron_deepstack.storekeeping.model import model_for
from megatron_deepstack.storekeeping.show import page
from megatron_deepstack.storekeeping.stack_map import NO_STACK, mosaics, slot_names, stack_maps
from megatron_deepstack.storekeeping.stats import statistics
from megatron_deepstack.storekeeping.stats_drawing import drawn
from megatron_deepstack.testing.tiny_data import write_tokenizer
from megatron_deepstack.testing.tiny_store import write_tiny_store

VISION = VisionConfig(image_size=16, patch_size=4)


def model(variant: Variant, sampler: Sampler = Sampler.DILATED_2D) -> ModelConfig:
    return ModelConfig(variant=variant, vision=VISION, stacks=StackConfig(sampler=sampler))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(write_tiny_store(tmp_path / "store", name="<b>&tiny"))


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_stacks_of_l_are_the_papers_dilated_sampling() -> None:
    """Stack i gw + j is `mosaic[i::gh, j::gw]` (section 3)."""
    for gw, gh in ((2, 2), (3, 1), (1, 2)):
        maps = stack_maps(model(Variant.DEEPSTACK_L), (gw, gh))
        ((_, numbers),) = mosaics(model(Variant.DEEPSTACK_L), (gw, gh))
        whole = np.concatenate([np.concatenate([maps[v] for v in row], axis=1) for row in numbers], axis=0)
        for i in range(gh):
            for j in range(gw):
                assert (whole[i::gh, j::gw] == i * gw + j).all()


@pytest.mark.parametrize("variant", [one for one in Variant if one.traits.whole_model is None])
@pytest.mark.parametrize("sampler", Sampler)
def test_maps_agree_with_the_rows_that_training_routes(variant: Variant, sampler: Sampler) -> None:
    asked = model(variant, sampler)
    maps = stack_maps(asked, (2, 2))
    if variant.stacks_in_vit:
        assert sorted(maps) == [1, 2, 3, 4]
        assert np.bincount(np.concatenate([m.reshape(-1) for m in maps.values()])).tolist() == [16] * 4
        return
    rows = image_rows(asked, (2, 2))
    for stack, view, token in zip(rows.stack, rows.view, rows.token, strict=True):
        if stack >= 0 and view >= 0:
            assert maps[int(view)].reshape(-1)[token] == stack
    assert sum(int((m != NO_STACK).sum()) for m in maps.values()) == int(((rows.stack >= 0) & (rows.view >= 0)).sum())


def test_high_res_crops_lie_where_they_were_cut() -> None:
    captions = dict(mosaics(model(Variant.DEEPSTACK_HD), (2, 1)))
    assert captions["2 x 1 crops"].tolist() == [[1, 2]]
    assert captions["high-res crops of the global view"].tolist() == [[3, 4], [5, 6]]
    assert captions["high-res crops of the crops"].tolist() == [[7, 8, 11, 12], [9, 10, 13, 14]]


def test_slots_are_named() -> None:
    assert slot_names(model(Variant.DEEPSTACK_L)) == [f"layer {n}" for n in (1, 2, 3, 4)]
    v = ModelConfig(variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=20, grid=GridRule.FIXED_2X2))
    assert slot_names(v)[:2] == ["ViT layer 20", "ViT layer 21"]


@pytest.mark.parametrize("layout", [ViewLayout.GLOBAL, ViewLayout.CROPS, ViewLayout.HIGH_RES])
def test_every_layout_has_a_page(tmp_path: Path, layout: ViewLayout) -> None:
    grids = ((1, 1),) if layout is ViewLayout.GLOBAL else ((2, 2), (1, 3))
    samples = ((0,), (len(grids) - 1, 0), ())
    store = Store.open(write_tiny_store(tmp_path / "store", layout=layout, grids=grids, samples=samples))
    html = page(store, model_for(store, None), [0, 1, 2], None)
    tags = Tags(html).tags
    stacks = [attributes for _, attributes in tags if attributes.get("class") == "stacks"]
    assert len(stacks) == {ViewLayout.GLOBAL: 0, ViewLayout.CROPS: 3, ViewLayout.HIGH_RES: 6}[layout]
    assert len([1 for tag, attributes in tags if (tag, attributes.get("class")) == ("section", "sample")]) == 3
    assert ("stack 3" in html) is (layout is not ViewLayout.GLOBAL)


def test_the_page_asks_nothing_of_the_network_and_escapes(store: Store) -> None:
    html = page(store, model_for(store, None), range(len(store)), None)
    tags = Tags(html).tags
    assert not {"script", "link", "b&tiny"} & {tag for tag, _ in tags}
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert sources
    assert all(source and source.startswith("data:image/") for source in sources)
    assert "&lt;b&gt;&amp;tiny-0" in html
    assert "<b>&tiny" not in html


def test_what_is_learned_is_marked(store: Store) -> None:
    sample = store.sample(0)
    html = page(store, model_for(store, None), [0], None)
    marked = " ".join(re.findall(r"<mark>([^<]*)</mark>", html)).split()
    assert marked == [str(token) for token in sample.tokens[sample.loss_mask == 1].tolist()]
    assert html.count("<kbd>image 1</kbd>") == 1


def test_with_a_tokenizer_it_is_text(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tiny.model")
    tokenizer = load_tokenizer(file)
    root = write_tiny_store(tmp_path / "store")
    store = Store.open(root)
    with pytest.raises(DataError, match=r"not the tokenizer of .*store: its sha256 is .* the store's 1{12}"):
        tokenizer_for(store, str(file), None)
    html = page(store, model_for(store, None), [1], tokenizer)
    shown = re.sub(r"<[^>]*>", "", html.split('class="text">')[1].split("</p>")[0])
    expected = tokenizer.decode(store.sample(1).tokens.tolist())
    assert "".join(shown.split()) in ("".join(expected.split()), "bos" + "".join(expected.split()))


def test_damage_met_is_an_error(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "store" / shard_path(0)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"view 0 of image 0 .* is damaged"):
        page(store, model_for(store, None), [0], None)


def test_samples_are_drawn_or_named(store: Store) -> None:
    assert chosen(store, None, 5, 0) == chosen(store, None, 5, 0) != chosen(store, None, 5, 1)
    assert chosen(store, None, 99, 0) == list(range(12))
    assert chosen(store, [3, 0], 5, 0) == [3, 0]
    with pytest.raises(ConfigError, match=r"--sample: 12 was asked for; .*store has samples 0 to 11"):
        chosen(store, [3, 12], 5, 0)


def test_statistics_add_up(store: Store) -> None:
    asked = model_for(store, None)
    stats = statistics(store, asked)
    for histogram in stats.histograms:
        total = {"images": 8, "samples": 12}[histogram.of]
        assert sum(count for _, count in histogram.bins) == total, histogram.title
    found = {histogram.title: dict(histogram.bins) for histogram in stats.histograms}
    assert found["grid, columns x rows"] == {
        "2 x 2": 2,
        "1 x 2": 1,
        "1 x 3": 1,
        "1 x 4": 1,
        "2 x 1": 1,
        "3 x 1": 1,
        "4 x 1": 1,
    }
    assert found["images of a sample"] == {"0": 3, "1": 6, "2": 3}
    assert found["views of an image"] == {"3": 2, "4": 2, "5": 4}
    longest = int(expanded_lengths(store, asked).max())
    assert f"longest: {longest}" in dict(stats.facts)["tokens of a sample"]


def test_a_store_of_nothing_has_statistics(tmp_path: Path) -> None:
    store = Store.open(write_tiny_store(tmp_path / "none", grids=(), samples=()))
    stats = statistics(store, model_for(store, None))
    assert dict(stats.facts)["samples"] == "0"
    ElementTree.fromstring(drawn(stats, "nothing"))


def test_the_verbs(tmp_path: Path) -> None:
    root = write_tiny_store(tmp_path / "store")
    html, svg = tmp_path / "x.html", tmp_path / "x.svg"
    result = CliRunner().invoke(app, ["store", "show", str(root), "-o", str(html), "--number", "3"])
    assert (result.exit_code, "3 of 12 samples" in result.output) == (0, True)
    assert html.read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, ["store", "stats", str(root), "--svg", str(svg)])
    assert (result.exit_code, "grid, columns x rows" in result.output) == (0, True)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    result = CliRunner().invoke(app, ["store", "stats", str(root), "--recipe", "demo"])
    assert (result.exit_code, "was made for something else" in result.output) == (4, True)
    result = CliRunner().invoke(app, ["store", "stats", str(root), "--svg", str(tmp_path / "no/where.svg")])
    assert (result.exit_code, "cannot be written" in result.output) == (3, True)


def test_the_drawing_has_axes_every_label_every_number_and_a_dark_theme(store: Store) -> None:
    stats = statistics(store, model_for(store, None))
    svg = drawn(stats, "sizes")
    root = ElementTree.fromstring(svg)
    texts = [part.text for part in root.iter() if part.tag.endswith("}text")]
    for histogram in stats.histograms:
        assert histogram.title in texts
        assert {label for label, _ in histogram.bins} <= set(texts)
        assert {f"{count:,}" for _, count in histogram.bins} <= set(texts)
    assert texts.count("0") >= len(stats.histograms), "each axis begins at 0"
    titles = [part.text for part in root.iter() if part.tag.endswith("}title")]
    assert "2 x 2: 2 images" in titles
    assert "prefers-color-scheme: dark" in svg


@pytest.mark.parametrize(
    "title", ["sizes", "Sizes of images and samples in /a/folder/of/many/levels/and/names/store.zarr"]
)
def test_the_drawing_can_be_read_at_400_pixels(store: Store, title: str) -> None:
    """No text is smaller than 9 pixels where a screen of that width shows the whole drawing, and none is cut off."""
    root = ElementTree.fromstring(drawn(statistics(store, model_for(store, None)), title))
    width = float(root.attrib["viewBox"].split()[2])
    texts = [part for part in root.iter() if part.tag.endswith("}text")]
    sizes = {part.text: float(part.attrib["font-size"]) for part in texts}
    assert min(size for words, size in sizes.items() if words != title) * 400 / width >= 9
    assert 16 + 0.6 * sizes[title] * len(title) <= width


def test_slots_are_stated_only_where_a_recipe_says_them(store: Store) -> None:
    """The store knows nothing of slots; the default ones may be another run's."""
    guessed, asked = (page(store, model_for(store, None), [0], None, slots_known=known) for known in (False, True))
    assert "added before layer" not in guessed
    assert "--recipe says before which layers" in guessed
    assert "stack 3, added before layer 4" in asked


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_bars_fit_the_terminal(tmp_path: Path, columns: int) -> None:
    root = write_tiny_store(tmp_path / "store")
    result = CliRunner().invoke(app, ["store", "stats", str(root)], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    assert "\u2588" in result.output
    assert "\u2026" not in result.output


def test_json_is_the_only_thing_on_stdout(tmp_path: Path) -> None:
    root = write_tiny_store(tmp_path / "store")
    result = CliRunner().invoke(app, ["store", "stats", str(root), "--json"])
    found = json.loads(result.stdout)
    assert (found["samples"], found["images"], found["counts"]["samples"]) == (12, 9, 12)
    assert {"view_pixels", "pixel_bytes", "tokens_with_images", "longest_sample"} <= set(found)
    assert sum(one["count"] for one in found["histograms"][1]["bins"]) == 8
    result = CliRunner().invoke(app, ["store", "verify", str(root), "--json", "--processes", "1"])
    assert json.loads(result.stdout) == {"store": str(root), "whole": True, "faults": []}
    shard = root / shard_path(0)
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    result = CliRunner().invoke(app, ["store", "verify", str(root), "--json", "--processes", "1"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["whole"]) == (4, False)
    assert set(found["faults"][0]) == {"where", "what", "advice"}
