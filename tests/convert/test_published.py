"""Checkpoints to start from: every naming that is recognised, and every fault that would train silently wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_deepstack.config.architectures import VISION
from megatron_deepstack.config.choices import Activation
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_deepstack.convert import published
from megatron_deepstack.convert.hf_names import Naming, by_published_name, to_naming, to_published
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.convert.tensor_files import LazyTensor, files_by_name
from megatron_deepstack.convert.tensor_writer import write_tensors
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.init import random_source
from megatron_deepstack.model.rules import Span
from megatron_deepstack.model.weights import VISION_PREFIX

pytestmark = pytest.mark.usefixtures("quiet_transformers")

TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 16,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
}
MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, ffn_hidden_size=12, num_layers=1, num_heads=2),
    language=LanguageConfig(vocab_size=16, hidden_size=12, ffn_hidden_size=16, num_layers=2, num_heads=3),
)
SIGLIP = replace(
    MODEL,
    vision=replace(MODEL.vision, kind="siglip", activation=Activation.GELU_TANH, layernorm_epsilon=1e-6),
)
QUERY = "model.layers.1.self_attn.q_proj.weight"
PATCH = f"{VISION_PREFIX}embeddings.patch_embedding.weight"
UP = f"{VISION_PREFIX}encoder.layers.0.mlp.fc1.bias"
LINEAR_2 = "model.mm_projector.2.weight"
NEWLINE = "model.image_newline"


def llava(kind: type[PreTrainedModel], config: type[LlavaConfig | LlavaNextConfig]) -> PreTrainedModel:
    return kind(config(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**TOWER), image_token_index=0))


# id, model, published names it must give, the recipe's model
CHECKPOINTS = [
    ("llama", lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), (QUERY, "lm_head.weight", "model.norm.weight"), MODEL),
    ("llama-bare", lambda: LlamaModel(LlamaConfig(**TEXT)), (QUERY, "model.embed_tokens.weight"), MODEL),
    ("clip", lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)), (PATCH, UP), MODEL),
    ("siglip", lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)), (PATCH, UP), SIGLIP),
    (
        "llava",
        lambda: llava(LlavaForConditionalGeneration, LlavaConfig),
        (QUERY, PATCH, UP, LINEAR_2, "lm_head.weight"),
        MODEL,
    ),
    (
        "llava-next",
        lambda: llava(LlavaNextForConditionalGeneration, LlavaNextConfig),
        (QUERY, PATCH, LINEAR_2, NEWLINE),
        MODEL,
    ),
]


@pytest.mark.parametrize(("build", "names", "model"), [row[1:] for row in CHECKPOINTS], ids=[r[0] for r in CHECKPOINTS])
@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_checkpoints_of_transformers(build, names, model, shard_size, tmp_path: Path) -> None:
    """The folder that `save_pretrained` writes, in one file and in several."""
    module = build()
    module.save_pretrained(tmp_path, max_shard_size=shard_size)
    expected = {to_published(name): value for name, value in module.state_dict().items()}
    read = published_source(tmp_path, model=model)
    for name in names:
        assert torch.equal(read(name, tuple(expected[name].shape)), expected[name]), name


def test_names_of_older_checkpoints() -> None:
    assert to_published("vision_model.encoder.layers.0.mlp.fc1.bias") == UP
    assert to_published("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias") == UP
    assert to_published("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias") == UP
    assert to_published("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias") == UP
    assert to_published("text_model.encoder.layers.0.mlp.fc1.bias") is None
    assert to_published("logit_scale") is None


@pytest.mark.parametrize("naming", Naming)
@pytest.mark.parametrize("name", [QUERY, PATCH, UP, LINEAR_2, "lm_head.weight", "model.norm.weight"])
def test_names_there_and_back(naming: Naming, name: str) -> None:
    assert to_published(to_naming(name, naming)) == name


def fallback(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, 7.0)


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, str(path / "model.safetensors"))
    return path


def test_absent_parts_come_from_the_fallback(tmp_path: Path) -> None:
    read = published_source(saved(tmp_path, model__norm__weight=torch.ones(12)), fallback)
    assert read("model.norm.weight", (12,)).tolist() == [1.0] * 12
    assert read(UP, (12,)).tolist() == [7.0] * 12
    assert read(NEWLINE, (2,)).tolist() == [7.0, 7.0]


def test_parts_come_from_different_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "tower").mkdir()
    text = saved(tmp_path / "text", model__norm__weight=torch.ones(12))
    tower = saved(tmp_path / "tower", **{UP.removeprefix(VISION_PREFIX).replace(".", "__"): torch.zeros(12)})
    read = published_source([str(text), str(tower)], fallback)
    assert [read(name, (12,))[0].item() for name in ("model.norm.weight", UP, "model.mm_projector.0.bias")] == [1, 0, 7]
    with pytest.raises(CheckpointError, match="both hold the language; name checkpoints of different parts"):
        published_source([text, tower, text], fallback)
    with pytest.raises(CheckpointError, match=r"text, .*tower: holds no tensor model.mm_projector.0.bias"):
        published_source([text, tower])("model.mm_projector.0.bias", (12,))


def test_a_part_with_holes_is_refused(tmp_path: Path) -> None:
    read = published_source(saved(tmp_path, model__norm__weight=torch.ones(12)), fallback)
    with pytest.raises(CheckpointError, match=f"holds no tensor {QUERY}"):
        read(QUERY, (12, 12))
    with pytest.raises(CheckpointError, match=r"set model.language.tied_embeddings=true"):
        read("lm_head.weight", (16, 12))


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor has a name of"):
        published_source(saved(tmp_path, bert=torch.ones(1)), fallback)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    read = published_source(saved(tmp_path, norm__weight=torch.ones(12)), fallback)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \(12,\), the recipe's model needs \(16,\)"):
        read("model.norm.weight", (16,))


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"norm.weight and model.norm.weight are both model.norm.weight"):
        by_published_name(["norm.weight", "model.norm.weight"], "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 6}, "model.language.num_heads: 6 in the checkpoint, 3 in the recipe"),
        ({"rms_norm_eps": 1e-6}, "model.language.norm_epsilon: 1e-06 in the checkpoint, 1e-05 in the recipe"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "model.language.rope_theta: 500000.0"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "model.language.rope_scaling.rope_type: 'linear' in the checkpoint, 'default' in the recipe",
        ),
        ({"rope_parameters": None, "rope_theta": 1e6}, "model.language.rope_theta: 1000000.0"),
        ({"tie_word_embeddings": True}, "model.language.tied_embeddings: True"),
        ({"num_hidden_layers": 40}, "model.language.num_layers: 40 in the checkpoint, 2 in the recipe"),
        ({"attention_bias": True}, "attention_bias: found True, computed is False"),
        ({"model_type": "qwen2"}, "model.language.qkv_bias: True in the checkpoint, False in the recipe"),
        ({"model_type": "qwen3"}, "model.language.qk_norm: True in the checkpoint, False in the recipe"),
    ],
)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError) as caught:
        published_source(tmp_path, model=MODEL)
    assert message in str(caught.value)


def language(**changes: object) -> ModelConfig:
    return replace(MODEL, language=replace(MODEL.language, **changes))


# id, decoder, the recipe that has room for all of it, a tensor that the recipe of a LLaMA has no place for
DECODERS = [
    (
        "biases",
        lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT)),
        language(qkv_bias=True),
        "6 tensors of decoder layers .*: model.layers.0.self_attn.k_proj.bias, .*; set model.language",
    ),
    (
        "norms",
        lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=4)),
        language(qk_norm=True, head_dim=4),
        "4 tensors of decoder layers .*: model.layers.0.self_attn.k_norm.weight, .*",
    ),
    (
        "layers",
        lambda: LlamaModel(LlamaConfig(**{**TEXT, "num_hidden_layers": 3})),
        language(num_layers=3),
        "9 tensors of decoder layers .* of 2 layers: layers.2.input_layernorm.weight, .*, ...;",
    ),
]


@pytest.mark.parametrize(("build", "model", "message"), [row[1:] for row in DECODERS], ids=[row[0] for row in DECODERS])
def test_decoder_tensors_without_a_place_are_refused(tmp_path: Path, build, model, message: str) -> None:
    build().save_pretrained(tmp_path)
    published_source(tmp_path, model=model)
    with pytest.raises(CheckpointError, match="describes another model than the recipe"):
        published_source(tmp_path, model=MODEL)
    (tmp_path / "config.json").unlink()
    published_source(tmp_path, model=model)
    with pytest.raises(CheckpointError, match=message):
        published_source(tmp_path, model=MODEL)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        f"{VISION_PREFIX}encoder.layers.1.mlp.fc1.bias",
        f"{VISION_PREFIX}post_layernorm.weight",
        LINEAR_2,
    ],
)
def test_buffers_unused_layers_of_a_tower_and_single_parts_are_taken(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2)}, str(tmp_path / "model.safetensors"))
    published_source(tmp_path, model=MODEL)


def test_another_tower_is_refused(tmp_path: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        published_source(tmp_path, model=MODEL)
    for field in ("activation", "layernorm_epsilon", "kind"):
        assert f"model.vision.{field}: " in str(caught.value)


def test_towers_of_the_architectures_agree_with_transformers_defaults() -> None:
    """What a hub config of these towers leaves out is what transformers takes for it."""
    siglip = VISION["siglip_so400m_14_384"]
    published = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14
    )
    assert siglip.layernorm_epsilon == published.layer_norm_eps
    assert published.hidden_act == "gelu_pytorch_tanh"


def test_pytorch_files(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.arange(12.0)}, tmp_path / "pytorch_model.bin")
    assert published_source(tmp_path)("model.norm.weight", (12,)).tolist() == list(range(12))
    torch.save({"model.norm.weight": print}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors or as a PyTorch file"):
        published_source(tmp_path / "evil.bin")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"{}"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        files_by_name(tmp_path)


def test_a_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: run\n")
    with pytest.raises(CheckpointError, match=r"is the folder of a run, .*`export` it and name the export, or go on"):
        published_source(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        files_by_name(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds none of model.safetensors.index.json, model.safetensors"):
        files_by_name(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names one.safetensors, not there"):
        files_by_name(tmp_path)


def test_shards_hold_everything_once(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.weight": torch.full((10,), float(n)) for n in range(5)}
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path, lazy, shard_bytes=80)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    read = published_source(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(read(f"model.{name}", (10,)), tensor)


SPANS = [Span(0, 0, 3), Span(0, 3, 8), Span(1, 2, 4), Span(0, 8, 8)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_part_is_that_of_the_whole_tensor(tmp_path: Path, name: str, span: Span) -> None:
    """From both kinds of files in their own dtype, and from the fallback."""
    tensor = torch.randn(8, 4).bfloat16()
    write = save_file if name.endswith("safetensors") else torch.save
    write({"model.embed_tokens.weight": tensor, "model.norm.weight": torch.ones(4)}, tmp_path / name)
    drawn = random_source(ModelConfig(), 0)
    source = published_source(tmp_path, fallback=drawn)
    part = source.part("model.embed_tokens.weight", (8, 4), span)
    assert part.dtype is torch.float32
    assert torch.equal(part, span.of(tensor.float()))
    projector = "model.mm_projector.0.weight"
    assert torch.equal(source.part(projector, (8, 4), span), span.of(drawn(projector, (8, 4))))
    plain = published_source(tmp_path, fallback=fallback)
    assert torch.equal(plain.part(projector, (8, 4), span), span.of(fallback(projector, (8, 4))))


def test_nothing_but_the_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the tensor needs a look as a whole; then its part is the same, and what is wrong is said as always."""
    path = saved(tmp_path, **{"model.embed_tokens.weight": torch.randn(8, 4), "model.norm.weight": torch.ones(4)})
    source = published_source(path)
    with pytest.raises(CheckpointError, match=r"has 8 rows, the recipe's vocabulary 6"):
        source.part("model.embed_tokens.weight", (6, 4), Span(0, 0, 2))
    with pytest.raises(CheckpointError, match="lm_head"):
        source.part("lm_head.weight", (8, 4), Span(0, 0, 2))
    monkeypatch.setattr(published, "read_tensor", None)
    assert source.part("model.embed_tokens.weight", (8, 4), Span(0, 0, 2)).shape == (2, 4)
