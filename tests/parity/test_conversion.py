"""`convert --check`: both sides of every pair of layouts compute the same, and a difference is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_deepstack.config.choices import GridRule, Precision, RopeType, Sampler, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    RopeScalingConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError, DataError, ParityError
from megatron_deepstack.inference.to_checkpoint import recipe_of_folder, write_on_rank
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.testing.parity.conversion import check_conversion
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite, tiny_qwen3_vl
from megatron_deepstack.testing.tiny_data import draw_photo, write_tokenizer

pytestmark = pytest.mark.usefixtures("quiet_transformers")

Pools = Callable[[int], RankPool]
VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=5, num_heads=2)
LANGUAGE = LanguageConfig(vocab_size=400, hidden_size=32, ffn_hidden_size=48, num_layers=6, num_heads=4, num_kv_heads=2)
MODEL = ModelConfig(vision=VISION, language=LANGUAGE)
LLAMA3 = RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=16)
LINEAR = RopeScalingConfig(rope_type=RopeType.LINEAR, factor=2.0)
MODELS = {
    "l": replace(MODEL, language=replace(LANGUAGE, rope_scaling=LLAMA3)),
    "v": replace(MODEL, variant=Variant.DEEPSTACK_V, stacks=StackConfig(grid=GridRule.FIXED_2X2, start=1)),
    "hd": replace(
        MODEL,
        language=replace(LANGUAGE, rope_scaling=LINEAR),
        variant=Variant.DEEPSTACK_HD,
        stacks=StackConfig(sampler=Sampler.GRID),
    ),
    "anyres": replace(MODEL, variant=Variant.LLAVA_ANYRES),
    "llava": replace(MODEL, variant=Variant.LLAVA),
}


def drawn(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in published_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        value = 1 + 0.1 * noise if is_norm else noise * (0.15 if len(shape) > 1 else 0.1)
        weights[name] = LazyTensor.of(value.to(dtype))
    return weights


def to_checkpoint(rank: int, source: str, target: str) -> None:
    recipe = recipe_of_folder(Path(source), Path(target))
    write_on_rank(recipe, source, target, groups_for(ParallelConfig()))
    from megatron_deepstack.config.load import recipe_to_yaml

    (Path(target) / "recipe.yaml").write_text(recipe_to_yaml(recipe))


def built_whole(rank: int, model: ModelConfig, folder: str) -> None:
    from megatron_deepstack.convert.export import export_model
    from megatron_deepstack.model.build import build_model, fill_model
    from megatron_deepstack.model.init import random_source

    groups = groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, random_source(model, 5), groups.decoder.tp)
    export_model(built, model, Path(folder), Naming.HUGGING_FACE)


PAIRS = {
    "l-paper-hf": ("l", Naming.PUBLISHED, Naming.HUGGING_FACE),
    "v-paper-hf": ("v", Naming.PUBLISHED, Naming.HUGGING_FACE),
    "hd-hf-paper": ("hd", Naming.HUGGING_FACE, Naming.PUBLISHED),
    "anyres-hf-paper": ("anyres", Naming.HUGGING_FACE, Naming.PUBLISHED),
    "llava-paper-hf": ("llava", Naming.PUBLISHED, Naming.HUGGING_FACE),
    "l-hf-checkpoint": ("l", Naming.HUGGING_FACE, None),
    "hd-paper-checkpoint": ("hd", Naming.PUBLISHED, None),
    "llava-hf-checkpoint": ("llava", Naming.HUGGING_FACE, None),
}


QUICK = ("l-paper-hf", "l-hf-checkpoint")


@pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PAIRS]
)
def test_both_sides_compute_the_same(ranks: Pools, tmp_path: Path, pair: str) -> None:
    """On drawn and on given pictures; in bf16 files too, since both sides compute in float32."""
    name, naming, to = PAIRS[pair]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    dtype = torch.bfloat16 if "checkpoint" in pair else torch.float32
    source, target, photo = tmp_path / "source", tmp_path / "target", tmp_path / "photo.jpg"
    write_model(drawn(MODELS[name], dtype), MODELS[name], source, naming, tokenizer)
    if to is None:
        ranks(1).run(to_checkpoint, str(source), str(target))
    else:
        convert_folder(source, target, to)
    draw_photo(75, 31, 3).save(photo)
    lines = list(check_conversion(source, target, [photo], pool=ranks(1)))
    assert [line.what.split(" (")[0] for line in lines] == [
        "pixels of 4 pictures",
        *(
            text
            for asked in ("one drawn picture", "two drawn pictures", "text alone", f"the picture {photo}")
            for text in (f"logits of {asked}", f"next tokens of {asked} that differ, of 8")
        ),
    ]
    assert all(line.passed for line in lines)


@pytest.mark.parametrize(
    ("model", "special_tokens"),
    [
        pytest.param(
            tiny_qwen3_vl(),
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            id="qwen3_vl",
        ),
        pytest.param(tiny_granite(), ("image_token_index",), id="granite4_vision"),
    ],
)
def test_a_model_of_transformers_and_its_checkpoint(
    ranks: Pools, tmp_path: Path, model: ModelConfig, special_tokens: tuple[str, ...]
) -> None:
    """Granite's config.json does not say how pictures are normalised, which another file does."""
    ranks(1).run(built_whole, model, str(tmp_path / "source"))
    file = tmp_path / "source" / "config.json"
    ids = {key: 57 + place for place, key in enumerate(special_tokens)}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ids}))
    ranks(1).run(to_checkpoint, str(tmp_path / "source"), str(tmp_path / "target"))
    lines = list(check_conversion(tmp_path / "source", tmp_path / "target", pool=ranks(1)))
    assert len(lines) == 6
    with pytest.raises(ConfigError, match=f"--picture: views of {model.variant} are drawn"):
        list(check_conversion(tmp_path / "source", tmp_path / "target", [tmp_path / "photo.jpg"]))


def test_a_difference_is_found_and_named(ranks: Pools, tmp_path: Path) -> None:
    """One entry of one matrix of the tower: logits of pictures differ, those of text do not."""
    write_model(drawn(MODEL), MODEL, tmp_path / "source", Naming.PUBLISHED)
    convert_folder(tmp_path / "source", tmp_path / "target", Naming.HUGGING_FACE)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.vision_tower.encoder.layers.0.mlp.fc1.weight"][0, 0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    lines = []
    with pytest.raises(ParityError, match="quantities exceed their tolerances"):
        lines.extend(check_conversion(tmp_path / "source", tmp_path / "target", pool=ranks(1)))
    with pytest.raises(DataError, match=r"--picture .*gone.jpg: cannot be read: No such file"):
        list(check_conversion(tmp_path / "source", tmp_path / "target", [tmp_path / "gone.jpg"], pool=ranks(1)))
