"""Folders of whole models: read, written and read again, tensor by tensor; and what is counted without building."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.convert.hf_folder_model import model_of_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.planning.budget.parameters import model_parameters
from megatron_deepstack.testing.ranks import RankPool, groups_for

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
