"""`check-parity`: whole models of transformers from their folders, in layouts; and folders that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_folders import TOKENS, granite4_vision, qwen3_vl, qwen3_vl_moe

from megatron_deepstack.config.choices import EncoderPlacement, Recompute
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.errors import CheckpointError, ConfigError, ParityError
from megatron_deepstack.planning.slots import decoder_slots, owner, stage_chunks
from megatron_deepstack.testing.parity.by_transformers import special_tokens
from megatron_deepstack.testing.parity.check import check_folder
from megatron_deepstack.testing.ranks import RankPool

pytestmark = pytest.mark.usefixtures("quiet_transformers")

INLINE = EncoderPlacement.INLINE
# of original lengths that some samples exceed and others do not
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": qwen3_vl,
    # taps out of order, a table that is not square, one patch a token, tied, several layers, another head, YaRN
    "qwen3_vl-odd": lambda folder: qwen3_vl(
        folder,
        tied=True,
        text={"num_hidden_layers": 8, "head_dim": 12, "rope_parameters": YARN},
        deepstack_visual_indexes=[2, 0, 3],
        num_position_embeddings=9,
        spatial_merge_size=1,
        hidden_act="gelu",
    ),
    # as many stacks as decoder layers: the last one is added to the output of the last layer
    "qwen3_vl-short": lambda folder: qwen3_vl(
        folder, text={"num_hidden_layers": 2}, depth=2, deepstack_visual_indexes=[0, 1]
    ),
    "granite": granite4_vision,
    # CLIP, whose class token is left out; other windows; taps that do not rise; fewer averaged stacks; tied; scaled
    "granite-clip": lambda folder: granite4_vision(
        folder,
        tied=True,
        text={"num_key_value_heads": None, "residual_multiplier": 1.0, "rope_parameters": LLAMA3},
        vision={"model_type": "clip_vision_model", "image_size": 32, "hidden_act": "quick_gelu"},
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        downsample_rate="2/4",
        deepstack_layer_map=[[2, 10], [-1, 4]],
        spatial_vision_layer=-3,
        spatial_target_layers=[11, 1, 0, 7],
    ),
    "qwen3_vl_moe": qwen3_vl_moe,
    # layers without experts, one expert a token, tensors in the form of the published folders, tied
    "qwen3_vl_moe-odd": lambda folder: qwen3_vl_moe(
        folder,
        tied=True,
        transposed=True,
        text={"decoder_sparse_step": 2, "num_experts_per_tok": 1, "num_experts": 5, "num_hidden_layers": 8},
    ),
    "qwen3_vl_moe-some": lambda folder: qwen3_vl_moe(
        folder, text={"mlp_only_layers": [0, 3], "num_experts_per_tok": 4, "moe_intermediate_size": 48}
    ),
    # five layers on four stages; only sampled stacks, from the first state; many small windows of three lines
    "granite-five": lambda folder: granite4_vision(
        folder,
        text={"num_hidden_layers": 5, "head_dim": 12, "rope_parameters": LINEAR},
        vision={"num_hidden_layers": 3, "image_size": 24},
        image_grid_pinpoints=[[24, 24], [24, 72], [72, 24]],
        deepstack_layer_map=[],
        spatial_vision_layer=1,
        spatial_target_layers=[4, 0, 3, 2],
    ),
    # no multipliers, one key/value head, YaRN, views of which the patches leave out two pixels, one state four times
    "granite-bare": lambda folder: granite4_vision(
        folder,
        text={
            "num_key_value_heads": 1,
            "rope_parameters": YARN,
            **dict.fromkeys(
                ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
            ),
        },
        vision={"image_size": 18},
        image_grid_pinpoints=[[18, 36], [36, 18], [36, 36]],
        deepstack_layer_map=[[-1, 9], [-1, 6], [-1, 3], [-1, 0]],
    ),
    # two taps of neighbouring layers, wide patches of one frame, merged three by three, grouped queries
    "qwen3_vl-wide": lambda folder: qwen3_vl(
        folder,
        text={"num_hidden_layers": 6, "num_key_value_heads": 1, "vocab_size": 130},
        depth=3,
        deepstack_visual_indexes=[1, 2],
        patch_size=6,
        temporal_patch_size=1,
        spatial_merge_size=3,
        num_heads=2,
    ),
    "qwen3_vl-no-taps": lambda folder: qwen3_vl(folder, deepstack_visual_indexes=[], spatial_merge_size=3),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a name, written once."""
    root, made = tmp_path_factory.mktemp("folders"), {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = FOLDERS[name](root / name)
        return made[name]

    return of


# Measured worst of all rows: logits 1.2e-6, loss 7e-8, gradients 3.1e-6.
ROWS = [
    ("qwen3_vl", 1, 1, ParallelConfig()),
    ("qwen3_vl-odd", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("granite-clip", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl_moe", 2, 1, ParallelConfig(tensor=2, expert=2)),
    ("qwen3_vl_moe", 1, 2, ParallelConfig()),
    ("qwen3_vl_moe-odd", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl_moe-odd", 1, 2, ParallelConfig()),
    ("qwen3_vl_moe-some", 2, 1, ParallelConfig(tensor=2)),
    ("qwen3_vl_moe-some", 2, 2, ParallelConfig(expert=2, recompute=Recompute.FULL)),
    ("qwen3_vl_moe", 4, 1, ParallelConfig(pipeline=2, expert=2)),
    ("qwen3_vl-short", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl-short", 2, 1, ParallelConfig(tensor=2, sequence_parallel=True, recompute=Recompute.FULL)),
    ("granite-clip", 1, 2, ParallelConfig()),
    ("granite", 4, 1, ParallelConfig(pipeline=4)),
    ("granite", 2, 2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ("granite", 2, 1, ParallelConfig(context=2)),
    ("granite", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("granite", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    ("granite", 2, 2, ParallelConfig(tensor=2, encoder_placement=INLINE)),
    ("granite", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL)),
    ("granite", 2, 1, ParallelConfig()),
    ("qwen3_vl-odd", 1, 1, ParallelConfig()),
    ("qwen3_vl-no-taps", 1, 2, ParallelConfig()),
    ("qwen3_vl", 2, 1, ParallelConfig(tensor=2)),
    ("qwen3_vl", 2, 1, ParallelConfig(context=2)),
    ("granite-clip", 4, 1, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
    ("qwen3_vl-odd", 4, 1, ParallelConfig(context=2, pipeline=2)),
    ("granite-five", 4, 1, ParallelConfig(pipeline=4)),
    ("granite-bare", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl-wide", 2, 1, ParallelConfig(pipeline=2)),
    ("qwen3_vl", 2, 1, ParallelConfig()),
    ("qwen3_vl-odd", 4, 1, ParallelConfig(pipeline=4)),
    ("qwen3_vl-odd", 2, 1, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    ("qwen3_vl-odd", 4, 1, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    ("qwen3_vl", 2, 1, ParallelConfig(tensor=2, encoder_placement=INLINE)),
    ("qwen3_vl-odd", 2, 2, ParallelConfig(pipeline=2, encoder_placement=INLINE, layers_per_stage=(5, 3))),
    ("qwen3_vl", 2, 1, ParallelConfig(pipeline=2, recompute=Recompute.FULL)),
]
QUICK = 5


def _id(row: tuple[str, int, int, ParallelConfig]) -> str:
    name, num_ranks, batch, p = row
    sizes = {
        "tp": p.tensor,
        "pp": p.pipeline,
        "vpp": p.virtual_pipeline,
        "cp": p.context,
        "ep": p.expert,
        "batch": batch,
    }
    words = [f"{key}{size}" for key, size in sizes.items() if size > 1]
    words += ["sp"] * p.sequence_parallel + ["inline"] * (p.encoder_placement is INLINE)
    words += ["recompute"] * (p.recompute is Recompute.FULL)
    replicas = num_ranks // (p.tensor * p.pipeline * p.context)
    return "-".join([name, *words, *([f"dp{replicas}"] if replicas > 1 else [])])


@pytest.mark.parametrize(
    ("name", "num_ranks", "batch", "parallel"),
    [pytest.param(*row, id=_id(row), marks=[pytest.mark.slow] * (k >= QUICK)) for k, row in enumerate(ROWS)],
)
def test_a_folder_computes_what_transformers_does(
    ranks: Callable[[int], RankPool],
    folder_of: Callable[[str], Path],
    name: str,
    num_ranks: int,
    batch: int,
    parallel: ParallelConfig,
) -> None:
    """Logits of every sample, the loss and every gradient, padded and packed; a wrong one raises."""
    lines = list(check_folder(folder_of(name), parallel, micro_batch_size=batch, pool=ranks(num_ranks)))
    found = [line.what for line in lines]
    videos = ("video of two frame pairs",) if name.startswith("qwen3_vl") and name != "qwen3_vl-wide" else ()
    for what in ("one image", "several images of different shapes", "text only", *videos):
        assert f"padded: logits of {what}" in found
    assert any("gradients of the vision" in what for what in found)
    assert any(what.startswith("packed") for what in found)


def test_a_weight_that_is_off_is_found(
    ranks: Callable[[int], RankPool], folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_deepstack.testing.parity import check

    true = check.by_transformers

    def shifted(*args: Any) -> Any:
        expected = true(*args)
        expected.logits[1][0, 0] += 1e-3
        expected.gradients["model.mm_projector.deepstack_merger_list.1.linear_fc2.bias"] *= 1.01
        return expected

    monkeypatch.setattr(check, "by_transformers", shifted)
    lines: list[str] = []
    with pytest.raises(ParityError, match="quantities exceed their tolerances"):
        lines += map(str, check_folder(folder_of("qwen3_vl"), ParallelConfig(), pool=ranks(1)))
    monkeypatch.undo()


def _changed(source: Path, target: Path, **changes: Any) -> Path:
    """A folder with another config.json; `text__x` changes x of its text_config."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        place = config[f"{section}_config"] if section else config
        place[name] = value
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision__deepstack_visual_indexes": [0, 4]}, r"model.vision.taps.*found \[0, 4\], expected different layers"),
        ({"vision__deepstack_visual_indexes": [0, -1]}, r"model.vision.taps: found \[0, -1\], expected"),
        ({"text__num_attention_heads": 0}, "model.language.num_heads: found 0, expected"),
        ({"vision__deepstack_visual_indexes": [1, 1]}, r"model.vision.taps.*expected different layers from 0 to 3"),
        ({"vision__window_size": 112}, "window_size: found 112, a key that is not known here"),
        ({"vision__out_hidden_size": 64}, "out_hidden_size: 64 in the checkpoint, 32 in the recipe"),
        ({"vision__hidden_act": "relu6"}, "relu6"),
        ({"vision__in_channels": 1}, "in_channels: found 1, computed is 3"),
        ({"text__attention_bias": True}, "attention_bias: found True, computed is False"),
        ({"text__hidden_act": "gelu"}, "activation: 'gelu' in the checkpoint"),
        (
            {"text__rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            r"rope_type: found 'dynamic', expected one of default, linear, llama3, yarn",
        ),
        ({"text__num_experts": 8}, "num_experts: found 8, a key that is not known here"),
        ({"text__model_type": "qwen2"}, "model.language.qkv_bias"),
        ({"model_type": "qwen9_vl"}, "model_type: found 'qwen9_vl', expected one of qwen3_vl"),
        ({"text__vocab_size": "many"}, "model.language.vocab_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_means_something_else_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = _changed(folder_of("qwen3_vl"), tmp_path / "changed", **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_of_folder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepstack_layer_map": [[-5, 1]]}, r"deepstack_layer_map: found the state -5 of the tower, expected 1 to 4"),
        ({"spatial_vision_layer": 0}, "spatial_vision_layer: found the state 0 of the tower"),
        ({"deepstack_layer_map": [[-1, 2], [-2, 3]]}, r"two stacks enter before the layers \[2\]"),
        ({"deepstack_layer_map": None}, "deepstack_layer_map: found None, expected pairs"),
        ({"spatial_target_layers": [1, 4]}, r"spatial_target_layers: found \[1, 4\], expected 4 layers"),
        ({"deepstack_layer_map": [[-1, "two"]]}, r"deepstack_layer_map: found \[\[-1, 'two'\]\], expected pairs"),
        ({"spatial_target_layers": 5}, "spatial_target_layers: found 5, expected 4 layers"),
        ({"spatial_target_layers": ["a", 1, 2, 3]}, r"spatial_target_layers: found \['a', 1, 2, 3\], expected 4"),
        ({"vision_feature_select_strategy": "default"}, "found 'default', expected 'full' for a siglip tower"),
        ({"image_token_id": 61}, "'image_token_id': 61}, two numbers of one token"),
        ({"downsample_rate": "3/8"}, "downsample_rate: found '3/8'; the second number must divide the 4 patches"),
        ({"downsample_rate": "half"}, "downsample_rate: found 'half', expected two sides"),
        ({"qformer__extra": 3}, "qformer_config: extra may change the result"),
        ({"text__attention_bias": True}, "attention_bias: found True, computed is False"),
        (
            {"vision__model_type": "dinov2"},
            "vision_config.model_type: found 'dinov2', expected one of clip",
        ),
        ({"unheard_of": 1}, "unheard_of: found 1, a key that is not known here"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_granite_that_means_something_else_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = _changed(folder_of("granite"), tmp_path / "changed", **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        model_of_folder(folder)
    assert str(folder) in str(caught.value)


def test_a_granite_stack_without_a_layer_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _changed(folder_of("granite"), tmp_path / "changed", spatial_target_layers=[2, 5, 8, 12])
    with pytest.raises(CheckpointError, match=r"config.json: .*stack 7 has slot 12, outside the model of 12 layers"):
        model_of_folder(folder)


def test_stacks_of_granite_reach_every_stage(folder_of: Callable[[str], Path]) -> None:
    slots = decoder_slots(model_of_folder(folder_of("granite")))
    stages = stage_chunks(12, ParallelConfig(pipeline=4))
    assert [owner(slot, stages) for slot in slots] == [3, 2, 1, 0, 0, 1, 2, 3]


def test_a_stack_without_a_layer_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _changed(folder_of("qwen3_vl"), tmp_path / "changed", text__num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"config.json: .*stack 1 has slot 2, outside the model of 1 layers"):
        model_of_folder(folder)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        pytest.param(ParallelConfig(tensor=3), "parallel.tensor: 3 tensor-parallel ranks do not divide", id="tp3"),
        pytest.param(ParallelConfig(virtual_pipeline=2), "parallel.virtual_pipeline: 2 chunks per stage", id="vpp2"),
        pytest.param(ParallelConfig(sequence_parallel=True), "parallel.sequence_parallel: splits", id="sp"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_ranks_start(
    folder_of: Callable[[str], Path], parallel: ParallelConfig, words: str
) -> None:
    folder = folder_of("qwen3_vl")
    with pytest.raises(ConfigError, match=words) as caught:
        next(check_folder(folder, parallel))
    assert f"the model is that of {folder}/config.json" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, r"broken: holds no tensor model.mm_projector.merger.norm.weight; expected shape \(24,\)"),
        (torch.zeros(5), r"broken: model.visual.merger.norm.weight has shape \(5,\), the recipe's model needs \(24,\)"),
    ],
    ids=["missing", "another shape"],
)
def test_a_tensor_that_is_not_as_the_config_says_is_refused_by_name(
    folder_of: Callable[[str], Path], tmp_path: Path, tensor: torch.Tensor | None, words: str
) -> None:
    folder = _changed(folder_of("qwen3_vl"), tmp_path / "broken")
    file, name = folder / "model.safetensors", "model.visual.merger.norm.weight"
    tensors = load_file(file)
    file.unlink()
    kept = {own: one for own, one in tensors.items() if own != name}
    save_file(kept if tensor is None else {**kept, name: tensor}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        list(check_folder(folder, ParallelConfig()))


def test_padding_is_no_text(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers gives the embedding of padding no gradient, and counts a negative number from the end."""
    model = model_of_folder(folder_of("qwen3_vl"))
    for number, expected in ((5, 5), (-1, 63)):
        config = {**TOKENS, "eos_token_id": [7, 8], "text_config": {"pad_token_id": number}}
        assert sorted(special_tokens(model, config, "config.json")) == sorted([7, 8, 60, 61, 62, 63, expected])


def test_an_image_token_outside_the_vocabulary_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _changed(folder_of("qwen3_vl"), tmp_path / "changed", image_token_id=99)
    with pytest.raises(CheckpointError, match=r"token ids \[99\] of images lie outside the vocabulary of 64"):
        next(check_folder(folder, ParallelConfig()))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: no such file; name a Hugging Face folder"):
        model_of_folder(tmp_path)
