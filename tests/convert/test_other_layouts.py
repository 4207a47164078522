"""Folders of weights into folders of another layout, and what is said of folders that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_deepstack.config.choices import Sampler, Template, Variant
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.convert import tensor_writer
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.convert.tensor_writer import write_tensors
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import CheckpointError, ConfigError
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.testing.tiny_data import write_tokenizer

VISION = VisionConfig(
    image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=4, num_heads=2, mean=(0.1, 0.2, 0.3)
)
LANGUAGE = LanguageConfig(vocab_size=400, hidden_size=32, ffn_hidden_size=48, num_layers=5, num_heads=4, num_kv_heads=2)
MODELS = {
    "l": ModelConfig(
        vision=VISION, language=LANGUAGE, stacks=StackConfig(sampler=Sampler.GRID, slots=(4, 3, 0, 1), num_crops=4)
    ),
    "hd-qwen3": ModelConfig(
        variant=Variant.DEEPSTACK_HD,
        vision=VISION,
        language=LanguageConfig(
            vocab_size=400,
            hidden_size=32,
            ffn_hidden_size=48,
            num_layers=5,
            num_heads=4,
            head_dim=16,
            qk_norm=True,
            rope_theta=5e5,
            tied_embeddings=True,
        ),
    ),
    "llava": ModelConfig(variant=Variant.LLAVA, vision=VISION, language=LANGUAGE),
    "llava-qwen2": ModelConfig(variant=Variant.LLAVA, vision=VISION, language=replace(LANGUAGE, qkv_bias=True)),
    "llava-qwen3": ModelConfig(
        variant=Variant.LLAVA, vision=VISION, language=replace(LANGUAGE, qk_norm=True, head_dim=8)
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.model"))


def drawn(model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = published_shapes(model).items()
    return {name: LazyTensor.of(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """The paper's layout to Hugging Face's and back, byte for byte, and the same from the other side."""
    about = About(data=DataConfig(template=Template.PLAIN, max_image_pixels=1000))
    write_model(drawn(MODELS[name]), MODELS[name], tmp_path / "paper", Naming.PUBLISHED, tokenizer, about)
    convert_folder(tmp_path / "paper", tmp_path / "hf", Naming.HUGGING_FACE)
    convert_folder(tmp_path / "hf", tmp_path / "back", Naming.PUBLISHED)
    convert_folder(tmp_path / "back", tmp_path / "hf2", Naming.HUGGING_FACE)
    first, second = contents(tmp_path / "paper"), contents(tmp_path / "back")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert contents(tmp_path / "hf")["model.safetensors"] == contents(tmp_path / "hf2")["model.safetensors"]
    found = read_exported(tmp_path / "hf")
    assert found.model.language == read_exported(tmp_path / "paper").model.language
    assert found.model.vision == MODELS[name].vision
    if MODELS[name].variant is not Variant.LLAVA:
        assert found.left_over == ()
        assert found.model.stacks == MODELS[name].stacks
        assert (found.data.template, found.data.max_image_pixels) == (Template.PLAIN, 1000)


def test_one_tensor_at_a_time_in_files_of_a_given_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a tensor is written, no other one is alive: reads and writes alternate."""
    events: list[str] = []
    model = MODELS["l"]
    lazy = {
        name: LazyTensor(tensor.shape, tensor.dtype, lambda tensor=tensor: (events.append("read"), tensor.read())[1])
        for name, tensor in drawn(model).items()
    }
    write = tensor_writer._write

    def watched(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        events.append("written")

    monkeypatch.setattr(tensor_writer, "_write", watched)
    write_tensors(tmp_path, lazy, shard_bytes=20_000)
    assert events == ["read", "written"] * len(lazy)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = dict.fromkeys(index["weight_map"].values(), 0)
    for name, file in index["weight_map"].items():
        sizes[file] += lazy[name].num_bytes
        assert torch.equal(load_file(tmp_path / file)[name], lazy[name].read())
    assert len(sizes) > 3
    assert max(sizes.values()) <= max(20_000, max(tensor.num_bytes for tensor in lazy.values()))


def test_names_left_over_and_missing_are_listed(tmp_path: Path) -> None:
    model = MODELS["l"]
    write_model(drawn(model), model, tmp_path / "a", Naming.PUBLISHED)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.zeros(1)}, tmp_path / "a" / "model.safetensors")
    said: list[str] = []
    convert_folder(tmp_path / "a", tmp_path / "b", Naming.HUGGING_FACE, say=said.append)
    assert any("left out, since the model does not use them: 1 tensor: model.extra.weight" in line for line in said)
    assert any("holds no tokenizer" in line for line in said)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors of the model are missing: model.norm.weight; complete"):
        convert_folder(tmp_path / "a", tmp_path / "c", Naming.HUGGING_FACE)
    assert not (tmp_path / "c").exists()


def test_an_export_for_transformers_starts_a_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """`train.init_from` reads it with the recipe's vocabulary, and says what another vocabulary lacks."""
    model, tensors = MODELS["l"], drawn(MODELS["l"])
    write_model(tensors, model, tmp_path / "hf", Naming.HUGGING_FACE, tokenizer)
    read = published_source(tmp_path / "hf", model=model)
    for name, shape in published_shapes(model).items():
        assert torch.equal(read(name, shape), tensors[name].read().float()), name
    with pytest.raises(CheckpointError, match=r"has 448 rows, the recipe's vocabulary 390: tokens were added"):
        read("lm_head.weight", (390, 32))


def released(folder: Path, **changes: object) -> Path:
    """A folder as the DeepStack release has it."""
    model = MODELS["l"]
    write_model(drawn(model), model, folder, Naming.PUBLISHED)
    config = json.loads((folder / "config.json").read_text())
    for key in ("stacks", "decoder", "data"):
        del config[key]
    config |= {"model_type": "llava_llama", "image_aspect_ratio": "deepstack", "num_crops": 3, "deepstack_start_id": 2}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_the_releases_own_fields_are_read(tmp_path: Path) -> None:
    found = read_exported(released(tmp_path / "l", deepstack_interval=0, deepstack_sampling="1d"))
    assert found.model.variant is Variant.DEEPSTACK_L
    assert found.model.stacks == StackConfig(num_crops=3, start=2, interval=0, sampler=Sampler.SEQUENTIAL_1D)
    with pytest.raises(CheckpointError, match=r"1 tensors of the model are missing: model.image_newline"):
        read_exported(released(tmp_path / "hd", is_anyres_deepstack=True))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 10**4])


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


FAULTS = {
    "truncated": (cut, r"model.safetensors: cannot be read as safetensors"),
    "missing shard": (lose_a_shard, r"names model-00001-of-00002.safetensors, not there; finish the download"),
    "other architecture": (rename, r"config.json: model_type 'mamba' is no whole model of ours; known are deepstack"),
    "other size": (narrow, r"model.safetensors: .* has shape .*config.json describes .*; the two belong to different"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"expected a folder with config.json and weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_file_and_the_way_on(tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    model = MODELS["l"]
    write_model(drawn(model), model, tmp_path / "a", Naming.PUBLISHED)
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        convert_folder(tmp_path / "a", tmp_path / "b", Naming.HUGGING_FACE)
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One that gives ids without a row in the embedding, by every layout that `convert` writes."""
    from megatron_deepstack.inference.to_checkpoint import checkpoint_of_folder

    small = replace(MODELS["l"], language=replace(LANGUAGE, vocab_size=100))
    write_model(drawn(small), small, tmp_path / "a", Naming.PUBLISHED, tokenizer)
    message = r"a/tokenizer.model: has \d\d\d tokens, .*a has 100 rows for text; .*put the model's own one there"
    for naming in Naming:
        with pytest.raises(CheckpointError, match=message):
            convert_folder(tmp_path / "a", tmp_path / "b", naming)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_of_folder(tmp_path / "a", tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_layout_that_is_not_known_is_refused() -> None:
    from megatron_deepstack.cli.run_verbs import convert

    with pytest.raises(ConfigError, match="--to: found 'gguf', expected hugging_face, paper or checkpoint"):
        convert(Path("a"), Path("b"), to="gguf")
