"""Reading reference cases: settings to configuration, rows to samples, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_deepstack.config.choices import GridRule, Sampler, Variant
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.published.reference_case import ReferenceCase, load_case

SETTINGS: dict[str, Any] = {
    "grids": [[2, 1], [1, 1]],
    "num_crops": 4,
    "is_anyres": False,
    "start_layer": 0,
    "interval": 2,
    "sampling": "1d",
    "args": "",
    "image_token_id": -200,
    "ignore_index": -100,
    "image_size": 8,
    "patch_size": 4,
    "vision": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "select_layer": -2,
        "hidden_act": "gelu",
    },
    "language": {
        "vocab_size": 9,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
    },
}
TENSORS: dict[str, Tensor] = {
    "input_ids": torch.tensor([[1, -200, 3, 0], [4, 5, 6, 7]]),
    "labels": torch.tensor([[-100, -100, 3, -100], [-100, 5, 6, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    "pixel_values.0": torch.zeros(3, 3, 8, 8),
    "pixel_values.1": torch.zeros(2, 3, 8, 8),
    "logits": torch.zeros(2, 6, 9),
    "loss": torch.tensor([2.5]),
    "weight.lm_head.weight": torch.zeros(9, 12),
    "grad.lm_head.weight": torch.ones(9, 12),
}


def read(folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> ReferenceCase:
    save_file(TENSORS | (tensors or {}), folder / "case.safetensors")
    (folder / "case.json").write_text(json.dumps(SETTINGS | settings))
    return load_case(folder / "case.safetensors")


def test_settings_become_a_model(tmp_path: Path) -> None:
    case = read(tmp_path)
    assert (case.name, case.loss, case.max_tokens) == ("case", 2.5, None)
    assert case.model.variant is Variant.DEEPSTACK_L
    assert case.model.stacks.sampler is Sampler.SEQUENTIAL_1D
    assert (case.model.stacks.start, case.model.stacks.interval) == (0, 2)
    assert (case.model.language.num_kv_heads, case.model.language.rope_theta) == (2, 500.0)
    assert not case.model.language.tied_embeddings
    assert case.weights.keys() == case.grads.keys() == {"lm_head.weight"}


def test_rows_become_samples_without_padding_or_dummy_views(tmp_path: Path) -> None:
    image, text = read(tmp_path).samples
    assert image.tokens.tolist() == [1, -200, 3]
    assert image.labels.tolist() == [-100, -100, 3]
    assert image.grids == ((2, 1),)
    assert image.pixel_values is not None
    assert image.pixel_values.shape == (3, 3, 8, 8)
    assert (text.pixel_values, text.grids) == (None, ())


def test_logits_have_each_samples_own_length(tmp_path: Path) -> None:
    assert [len(rows) for rows in read(tmp_path).logits] == [2 + 4, 4]


def test_rows_cut_by_a_maximum_length_are_noticed(tmp_path: Path) -> None:
    case = read(tmp_path, tensors={"logits": torch.zeros(2, 5, 9)})
    assert case.max_tokens == 5
    assert [len(rows) for rows in case.logits] == [5, 4]


def test_flags(tmp_path: Path) -> None:
    fixed = read(tmp_path, args="2xsample").model
    assert (fixed.variant, fixed.stacks.grid) == (Variant.DEEPSTACK_L, GridRule.FIXED_2X2)
    in_vit = read(tmp_path, args="deepstack_vit+2xsample+lsvit_start_layer_2").model
    assert in_vit.variant is Variant.DEEPSTACK_V
    assert (in_vit.stacks.start, in_vit.stacks.interval) == (2, 1)
    assert read(tmp_path, is_anyres=True).model.variant is Variant.DEEPSTACK_HD


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        pytest.param({"args": "dummy_local"}, {}, "cannot honour dummy_local in args; known: 2xsample", id="flag"),
        pytest.param({"args": "deepstack_vit"}, {}, "deepstack_vit without lsvit_start_layer_N", id="no_start"),
        pytest.param({"sampling": "3d"}, {}, "sampling is '3d'; known: 2d, 1d, grid", id="sampling"),
        pytest.param({"vision": {}}, {}, "vision: no key 'hidden_size'", id="missing_key"),
        pytest.param({}, {"attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)}, "not padded on the right", id="left"),
        pytest.param({}, {"input_ids": torch.full((2, 4), -200)}, "3 placeholders, but", id="two_images"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, tensors, **settings)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"case\.json: no such file"):
        load_case(tmp_path / "case.safetensors")
    read(tmp_path)
    (tmp_path / "case.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load_case(tmp_path / "case")
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load_case(tmp_path / "case.json")
