"""Folders of weights as checkpoints: exact there and back, read by every verb, and a start for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_deepstack.checkpoint.folder import newest_whole
from megatron_deepstack.config.choices import LoraTarget, Part, Precision, Template, Variant
from megatron_deepstack.config.schema import (
    DataConfig,
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, RankError
from megatron_deepstack.inference.export import export_on_rank, export_run
from megatron_deepstack.inference.to_checkpoint import checkpoint_of_folder, recipe_of_folder, write_on_rank
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.run_folder.recipe import recipe_of_run
from megatron_deepstack.run_folder.starting_weights import read_starting_weights
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_recipe
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]
VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2)
LANGUAGE = LanguageConfig(
    vocab_size=500, hidden_size=32, ffn_hidden_size=48, num_layers=4, num_heads=4, num_kv_heads=2, qkv_bias=True
)
MODELS = {
    "l": ModelConfig(vision=VISION, language=LANGUAGE, stacks=StackConfig(slots=(0, 1, 3, 3))),
    "hd-tied": ModelConfig(
        variant=Variant.DEEPSTACK_HD,
        vision=VISION,
        stacks=StackConfig(start=0),
        language=replace(LANGUAGE, qkv_bias=False, qk_norm=True, tied_embeddings=True),
    ),
    "llava": ModelConfig(variant=Variant.LLAVA, vision=VISION, language=replace(LANGUAGE, qkv_bias=False)),
    "qwen3-vl": tiny_qwen3_vl(),
    "qwen3-vl-moe": tiny_qwen3_vl_moe(),
}
PRECISION_OF = {torch.bfloat16: Precision.BF16, torch.float32: Precision.FP32}


def drawn(model: ModelConfig, dtype: torch.dtype) -> dict[str, LazyTensor]:
    from megatron_deepstack.model.init import random_source

    source = random_source(model, 5)
    return {name: LazyTensor.of(source(name, shape).to(dtype)) for name, shape in published_shapes(model).items()}


def write_folder(folder: Path, model: ModelConfig, dtype: torch.dtype, naming: Naming, tokenizer: Path | None) -> Path:
    about = About(data=DataConfig(template=Template.PLAIN), seq_length=256)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    write_model(drawn(model, dtype), model, folder, naming, words, about)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model")


def there_and_back(rank: int, source: str, target: str, back: str, naming: Naming) -> None:
    groups = groups_for(ParallelConfig())
    recipe = recipe_of_folder(Path(source), Path(target))
    write_on_rank(recipe, source, target, groups)
    export_on_rank(recipe, back, naming, groups)


def built_folder(rank: int, model: ModelConfig, folder: str, precision: Precision = Precision.BF16) -> None:
    """A folder of a model whose shapes are known once it is built."""
    from megatron_deepstack.convert.export import export_model
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source

    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), precision, groups)
    fill_model(built, random_source(model, 5), groups.decoder.tp)
    export_model(built, model, Path(folder), Naming.HUGGING_FACE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(ranks: Pools, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """A folder into a checkpoint, and the checkpoint exported: the same tensors, bit for bit, in the same dtype."""
    whole = MODELS[name].variant.traits.whole_model is not None
    naming = Naming.HUGGING_FACE if whole or name == "llava" else Naming.PUBLISHED
    if whole:
        ranks(1).run(built_folder, MODELS[name], str(tmp_path / "folder"), PRECISION_OF[dtype])
    else:
        write_folder(tmp_path / "folder", MODELS[name], dtype, naming, None)
    source, back = tmp_path / "folder", tmp_path / "back"
    ranks(1).run(there_and_back, str(source), str(tmp_path / "run"), str(back), naming)
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype is after[key].dtype
        assert torch.equal(value, after[key]), key
    found, faults = newest_whole(tmp_path / "run")
    assert faults == []
    assert found.manifest.weights_alone
    assert found.manifest.step == 0
    origins = read_starting_weights(tmp_path / "run")
    assert {tensor.file for tensor in origins.tensors} == {str(source / "model.safetensors")}


@pytest.mark.slow
def test_a_run_folder_that_verbs_read(tmp_path: Path, tokenizer: Path) -> None:
    """What the command line calls: its recipe says what the folder said, and `export` gives the folder back."""
    source = write_folder(tmp_path / "folder", MODELS["l"], torch.bfloat16, Naming.HUGGING_FACE, tokenizer)
    said: list[str] = []
    target = checkpoint_of_folder(source, tmp_path / "run", say=said.append)
    assert sorted(file.name for file in target.iterdir()) == [
        "checkpoints",
        "recipe.yaml",
        "started_in.txt",
        "starting_weights.json",
        "tokenizer.model",
    ]
    recipe = recipe_of_run(target)
    assert recipe.model == replace(MODELS["l"], language=replace(LANGUAGE, head_dim=8))
    assert (recipe.train.precision, recipe.train.seq_length) == (Precision.BF16, 256)
    assert recipe.data.template is Template.PLAIN
    assert recipe.data.tokenizer == str(target / "tokenizer.model")
    assert any("one parameter at a time (the largest tensor: " in line for line in said)
    back = export_run(target, tmp_path / "back", Naming.HUGGING_FACE)
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        checkpoint_of_folder(source, target)


def train_on_rank(rank: int, recipe: Recipe) -> None:
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Recipe:
    """A recipe with a store, of model l."""
    folder = tmp_path_factory.mktemp("data")
    names = write_photos(folder / "images", 2)
    records = write_records(folder / "records.json", [record(n, [name]) for n, name in enumerate(names)])
    base = tiny_recipe(MODELS["l"], global_batch_size=2)
    section = DataConfig(
        records=(str(records),),
        images=str(folder / "images"),
        tokenizer=str(tokenizer),
        store=str(folder / "store.zarr"),
    )
    run = replace(base, data=section, train=replace(base.train, steps=2))
    preprocess(run, str(section.store), workers=0)
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


PRECISIONS = {"fp32": Precision.FP32, "bf16": Precision.BF16}
TRAININGS = {
    "pp2": (ParallelConfig(pipeline=2), LoraConfig()),
    "tp2-zero": (ParallelConfig(tensor=2, distributed_optimizer=True), LoraConfig()),
    "lora": (ParallelConfig(pipeline=2), LoraConfig(rank=2, vision_targets=tuple(LoraTarget), projector=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TRAININGS)
def test_training_begins_from_it(
    ranks: Pools, data: Recipe, tmp_path: Path, tokenizer: Path, name: str, precision: str
) -> None:
    """The same losses as of a run that names the folder in `train.init_from`; then it resumes as any other run."""
    parallel, lora = TRAININGS[name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    source = write_folder(tmp_path / "folder", MODELS["l"], dtype, Naming.PUBLISHED, tokenizer)
    trainable = (*([Part.VISION] if lora.vision_targets else []), Part.PROJECTOR, Part.LANGUAGE)
    train = replace(data.train, precision=PRECISIONS[precision], trainable=trainable)
    run = replace(data, parallel=parallel, lora=lora, train=train)
    named = replace(run, run_dir=str(tmp_path / "named"), train=replace(train, init_from=(str(source),)))
    ranks(2).run(train_on_rank, named)
    target = tmp_path / "begun"
    ranks(1).run(write_only, str(source), str(target))
    begun = replace(run, run_dir=str(target))
    ranks(2).run(train_on_rank, begun)
    assert losses(target) == losses(tmp_path / "named")
    longer = replace(begun, train=replace(begun.train, steps=3))
    ranks(2).run(train_on_rank, longer)
    assert [json.loads(line)["step"] for line in (target / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def write_only(rank: int, source: str, target: str) -> None:
    write_on_rank(recipe_of_folder(Path(source), Path(target)), source, target, groups_for(ParallelConfig()))


def test_another_model_is_refused(ranks: Pools, data: Recipe, tmp_path: Path, tokenizer: Path) -> None:
    source = write_folder(tmp_path / "folder", MODELS["l"], torch.float32, Naming.PUBLISHED, tokenizer)
    ranks(1).run(write_only, str(source), str(tmp_path / "run"))
    other = replace(data.model, language=replace(LANGUAGE, num_heads=8, num_kv_heads=4, head_dim=8))
    with pytest.raises(RankError) as caught:
        ranks(1).run(train_on_rank, replace(data, model=other, run_dir=str(tmp_path / "run")))
    assert "model.language.num_heads: 4 in the checkpoint, 8 in the recipe" in str(caught.value.__cause__)


def test_a_folder_with_holes_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = write_folder(tmp_path / "folder", MODELS["l"], torch.float32, Naming.PUBLISHED, tokenizer)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors of the model are missing: model.norm.weight"):
        checkpoint_of_folder(source, tmp_path / "run")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder"]
