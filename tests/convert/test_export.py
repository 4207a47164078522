"""A run of two stages, exported: transformers loads it and computes the same logits; or it starts another run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from megatron_deepstack.config.choices import Precision, Variant
from megatron_deepstack.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    VisionConfig,
)
from megatron_deepstack.convert.export import export_model, new_folder, require_exportable, require_room
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.errors import CheckpointError, ConfigError, DataError
from megatron_deepstack.inference.export import export_on_rank, export_run, one_rank_recipe
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import TinySample, tiny_model
from megatron_deepstack.testing.tiny import tiny_recipe as tiny_run
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

pytestmark = pytest.mark.usefixtures("quiet_transformers")

Pools = Callable[[int], RankPool]
VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2)
LANGUAGE = LanguageConfig(vocab_size=500, hidden_size=32, ffn_hidden_size=48, num_layers=4, num_heads=4, num_kv_heads=2)
LLAVA = ModelConfig(variant=Variant.LLAVA, vision=VISION, language=LANGUAGE)
# Measured: logits 1.0e-7 apart, the largest 0.47; both in float32.
TOLERANCE = 2e-6


def train_on_rank(rank: int, recipe: Recipe) -> None:
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), None)


@pytest.fixture(scope="module")
def trained(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps of LLaVA at pp=2."""
    folder = tmp_path_factory.mktemp("export")
    names = write_photos(folder / "images", 2)
    data = DataConfig(
        records=(str(write_records(folder / "records.json", [record(n, [name]) for n, name in enumerate(names)])),),
        images=str(folder / "images"),
        tokenizer=str(write_tokenizer(folder / "tokenizer.model")),
        store=str(folder / "store.zarr"),
    )
    run = tiny_run(LLAVA, ParallelConfig(pipeline=2), global_batch_size=2)
    run = replace(run, data=data, train=replace(run.train, steps=2), run_dir=str(folder / "run"))
    preprocess(run, str(data.store), workers=0)
    ranks(2).run(train_on_rank, run)
    return folder / "run"


def sample() -> TinySample:
    generator = np.random.default_rng(5)
    tokens = generator.integers(1, LANGUAGE.vocab_size, 9)
    tokens[3] = IMAGE_TOKEN_ID
    pixels = generator.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    return TinySample(tokens=tokens, loss_mask=np.ones(9, np.int64), grids=((1, 1),), pixels=(pixels,))


def export_and_answer(rank: int, recipe: Recipe, output: str) -> torch.Tensor:
    """Export on this rank, and our own logits (T, V) of `sample` from the same checkpoint."""
    from megatron_deepstack.inference.loading import load_engine
    from megatron_deepstack.planning.batch.step_plan import plan_step
    from megatron_deepstack.step.train_step import VisualPass

    groups = groups_for(recipe.parallel)
    export_on_rank(recipe, output, Naming.HUGGING_FACE, groups)
    engine = load_engine(recipe, groups)
    plan = plan_step(recipe.model, recipe.parallel, [[sample().planned(recipe.model, 64)]], groups.replica_rank)
    (logits_BSV,) = VisualPass(engine, plan, torch.from_numpy(sample().pixels[0])).logits(plan)
    return logits_BSV[0, :, : LANGUAGE.vocab_size]


def test_transformers_computes_the_same_logits(ranks: Pools, trained: Path, tmp_path: Path) -> None:
    ours = ranks(1).run(export_and_answer, one_rank_recipe(trained), str(tmp_path / "hf"))[0]
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    given = sample()
    pixels = processor(Image.fromarray(given.pixels[0][0]), return_tensors="pt")["pixel_values"]
    tokens = torch.from_numpy(given.tokens)
    image = tokens == IMAGE_TOKEN_ID
    tokens = tokens.masked_fill(image, model.config.image_token_id).repeat_interleave(torch.where(image, 16, 1))
    with torch.no_grad():
        theirs = model(input_ids=tokens[None], pixel_values=pixels).logits[0]
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=0)  # the image token has a row that no word has


def test_pictures_are_prepared_alike(ranks: Pools, trained: Path, tmp_path: Path) -> None:
    """transformers' processor on a photo gives the global view of the store, normalised."""
    ranks(1).run(export_and_answer, one_rank_recipe(trained), str(tmp_path / "hf"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    photo = Image.open(next((trained.parent / "images").glob("*.jpg"))).convert("RGB")
    view = np.asarray(photo.resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    expected = ((view - VISION.mean) / VISION.std).transpose(2, 0, 1)
    theirs = processor(photo, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(theirs, expected, atol=1e-5)


@pytest.mark.slow
def test_a_rank_of_its_own(trained: Path, tmp_path: Path) -> None:
    """What the command line calls: under published names, with the tokenizer, ready for `train.init_from`."""
    output = export_run(trained, tmp_path / "published")
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.model",
    ]
    assert published_source(output, model=LLAVA)("lm_head.weight", (500, 32)).abs().max() > 0
    modes = {file.stat().st_mode & 0o777 for file in output.iterdir()}
    assert modes == {0o666 & ~_umask()}, "the weights are readable for whom the other files are"
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        export_run(trained, output)


@pytest.mark.slow
def test_a_run_says_where_its_weights_came_from(ranks: Pools, trained: Path, tmp_path: Path) -> None:
    """All drawn in the first run; in one that starts from its export all from there; and the report shows it."""
    from megatron_deepstack.report.page import write_report
    from megatron_deepstack.run_folder.starting_weights import DRAWN, read_starting_weights

    first = read_starting_weights(trained)
    assert {tensor.file for tensor in first.tensors} == {None}
    output = export_run(trained, tmp_path / "published")
    recipe = one_rank_recipe(trained)
    begun = replace(recipe, run_dir=str(tmp_path / "second"), train=replace(recipe.train, init_from=(str(output),)))
    ranks(1).run(train_on_rank, begun)
    second = read_starting_weights(tmp_path / "second")
    assert [tensor.name for tensor in second.tensors] == [tensor.name for tensor in first.tensors]
    assert {tensor.file for tensor in second.tensors} == {str(output / "model.safetensors")}
    assert second.left_over == ()
    for run, place in ((trained, DRAWN), (tmp_path / "second", str(output / "model.safetensors"))):
        text = write_report(run, tmp_path / "report.html").read_text()
        assert "Where the weights came from" in text
        assert place in text


def _umask() -> int:
    """Of this process; it can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_overrides_name_a_tokenizer_that_has_moved(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.model"
    moved.write_bytes((trained.parent / "tokenizer.model").read_bytes())
    gone = ["data.tokenizer=gone.model"]
    with pytest.raises(DataError, match=rf"{tmp_path}/gone.model is not there.*data.tokenizer=PATH"):
        export_run(trained, tmp_path / "out", overrides=[f"data.tokenizer={tmp_path}/gone.model"])
    assert one_rank_recipe(trained, [*gone, f"data.tokenizer={moved}"]).data.tokenizer == str(moved)
    with pytest.raises(ConfigError, match=r"did you mean 'data\.tokenizer'"):
        export_run(trained, tmp_path / "out", overrides=["data.tokeniser=x"])
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_or_is_too_small_is_said_before_anything_starts(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"out: cannot be created: Not a directory \(tried in .*file\)"):
        export_run(trained, tmp_path / "file" / "out")
    with pytest.raises(DataError, match="cannot be created"):
        require_room(Path("/proc/out"), 1)
    with pytest.raises(DataError, match=r"about 1000 TB are needed, .* free; make room"):
        require_room(tmp_path / "deep" / "out", 10**15)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_leaves_a_line_and_no_folder(tmp_path: Path) -> None:
    words = r"out: cannot be written: .*No space left on device.*nothing of it is left"

    def fill_up() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "half").write_text("written")
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=words):
        fill_up()
    assert list(tmp_path.iterdir()) == []


def export_built(rank: int, model: ModelConfig, output: str) -> None:
    """Export a freshly initialised model, in bf16."""
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source

    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.BF16, groups)
    fill_model(built, random_source(model, 3), groups.decoder.tp)
    export_model(built, model, Path(output), Naming.PUBLISHED)


@pytest.mark.parametrize("variant", [Variant.DEEPSTACK_L, Variant.DEEPSTACK_HD])
def test_published_names_start_another_run(ranks: Pools, tmp_path: Path, variant: Variant) -> None:
    """Every variant, in the model's dtype, read back under the recipe it was made with and no other."""
    from megatron_deepstack.model.init import random_source

    model = tiny_model(variant=variant)
    ranks(1).run(export_built, model, str(tmp_path / "out"))
    read, drawn = published_source(tmp_path / "out", model=model), random_source(model, 3)
    names = ["model.layers.7.self_attn.k_proj.weight", "lm_head.weight", "model.mm_projector.2.weight"]
    names += ["model.image_newline"] if variant is Variant.DEEPSTACK_HD else []
    shapes = {"lm_head.weight": (61, 32), "model.image_newline": (32,)}
    for name in names:
        shape = shapes.get(name, (32, 32))
        assert torch.equal(read(name, shape), drawn(name, shape).bfloat16().float()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match=r"model.language.num_heads: 4 in the checkpoint, 8 in the recipe"):
        published_source(tmp_path / "out", model=replace(model, language=replace(model.language, num_heads=8)))


def test_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    odd = replace(LLAVA, language=replace(LANGUAGE, qk_norm=True, qkv_bias=True))
    with pytest.raises(ConfigError, match="no decoder with both qk_norm and qkv_bias"):
        require_exportable(odd, tmp_path / "out", Naming.HUGGING_FACE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        require_exportable(tiny_model(), tmp_path, Naming.PUBLISHED)
    with pytest.raises(ConfigError, match=r"holds no recipe.yaml"):
        one_rank_recipe(tmp_path)
