"""Folders of whole models: read, written and read again, tensor by tensor; and what is counted without building."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_deepstack.config.choices import Part, Precision, RopeType
from megatron_deepstack.config.schema import ModelConfig, ParallelConfig, RopeScalingConfig, StackConfig
from megatron_deepstack.convert.export import require_exportable
from megatron_deepstack.convert.hf_config import require_same_model
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.hf_whole import model_of_config
from megatron_deepstack.convert.hf_whole_written import whole_config
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.planning.budget.parameters import model_parameters
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite, tiny_qwen3_vl, tiny_qwen3_vl_moe

sys.path.append(str(Path(__file__).parents[1] / "parity"))

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def export_on_rank(rank: int, source: Path, target: Path) -> tuple[int, int]:
    """Read a folder and write it; the numbers of parameters of the encoder and the decoder."""
    from megatron_deepstack.convert.export import export_model
    from megatron_deepstack.convert.published import published_source
    from megatron_deepstack.model.build import build_model, fill_model

    model, groups = model_of_folder(source), groups_for(ParallelConfig())
    built = build_model(model, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, published_source(source, model=model), groups.decoder.tp)
    export_model(built, model, target, Naming.PUBLISHED)
    encoder = sum(parameter.numel() for parameter in built.encoder.parameters())
    return encoder, sum(parameter.numel() for chunk in built.chunks for parameter in chunk.parameters())


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "granite4_vision"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_folder_is_written_as_it_was_read(
    ranks: Callable[[int], RankPool], tmp_path: Path, name: str, tied: bool
) -> None:
    """All tensors bit for bit; transformers loads the result, and it is the same model with the same config for us."""
    import whole_folders
    from transformers import AutoModelForImageTextToText

    source, target = getattr(whole_folders, name)(tmp_path / "source", tied=tied), tmp_path / "target"
    encoder, _ = ranks(1).run(export_on_rank, source, target)[0]
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    unused = ("model.vision_tower.head.", "model.vision_tower.post_layernorm.")
    assert {n for n in before if not n.startswith(unused)} == {n for n in after if not n.startswith(unused)}
    for tensor_name, tensor in after.items():
        if not tensor_name.startswith(unused):
            assert torch.equal(tensor, before[tensor_name]), tensor_name
    model = model_of_folder(target)
    assert model == model_of_folder(source)
    module = AutoModelForImageTextToText.from_pretrained(target)
    loaded = dict(module.named_parameters())
    assert all(torch.equal(loaded[n], before[n]) for n in before if n in loaded and not n.startswith(unused))
    counted = model_parameters(model)
    assert sum(counted.values()) - counted[Part.LANGUAGE] == encoder


SCALED = [
    RopeScalingConfig(rope_type=RopeType.LINEAR, factor=2.0),
    RopeScalingConfig(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=16),
    RopeScalingConfig(rope_type=RopeType.YARN, factor=4.0, original_max_position_embeddings=16),
]


@pytest.mark.parametrize("scaling", SCALED, ids=lambda scaling: str(scaling.rope_type))
@pytest.mark.parametrize("make", [tiny_qwen3_vl, tiny_qwen3_vl_moe, tiny_granite])
def test_scaled_positions_keep_their_base(make: Callable[[], ModelConfig], scaling: RopeScalingConfig) -> None:
    """By transformers, which looks for it beside `rope_scaling`, and by this system."""
    from transformers import CONFIG_MAPPING

    model = make()
    model = replace(model, language=replace(model.language, rope_theta=12345.0, rope_scaling=scaling))
    config = whole_config(model, {})
    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(config).text_config.rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"]) == (12345.0, str(scaling.rope_type))
    found = model_of_config(config, "config.json").language
    assert (found.rope_theta, found.rope_scaling) == (12345.0, scaling)


GRANITE = tiny_granite()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            tiny_qwen3_vl(stacks=StackConfig(slots=(3, 6))),
            r"model.stacks.slots: found \(3, 6\), and Qwen3VLForConditionalGeneration computes \(1, 2\)",
        ),
        (replace(GRANITE, stacks=StackConfig(slots=(0, 0, 1, 2, 3, 4))), r"two stacks enter before the layers \[0\]"),
        (
            replace(GRANITE, vision=replace(GRANITE.vision, taps=(0, 2, 3, 2, 3, 3))),
            r"model.vision.taps: found \(0, 2, 3, 2, 3, 3\), and Granite4Vision\w+ computes \(0, 2, 3, 3, 3, 3\)",
        ),
        (replace(GRANITE, qformer=replace(GRANITE.qformer, num_sampled=2)), r"spatial_target_layers: found \[6, 7\]"),
        (replace(GRANITE, qformer=replace(GRANITE.qformer, num_heads=2)), r"model.qformer.num_heads: found 2"),
    ],
    ids=["slots-of-qwen", "slots-of-granite", "taps", "sampled", "heads"],
)
def test_what_transformers_would_compute_otherwise_is_not_written(
    tmp_path: Path, model: ModelConfig, words: str
) -> None:
    """Under no names, since such a model has those of transformers alone."""
    for naming in Naming:
        with pytest.raises(ConfigError, match=words):
            require_exportable(model, tmp_path / "out", naming)


def test_layers_behind_the_last_tap_are_no_difference() -> None:
    """A recipe may run more of the tower than its taps need; the config names the last tapped state."""
    model = replace(GRANITE, vision=replace(GRANITE.vision, num_layers=6, select_layer=-1))
    require_same_model(whole_config(model, {}), model, "out")
