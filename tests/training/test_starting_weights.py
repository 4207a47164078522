"""Which tensors a run starts from came from which file: the list, its table, and that it names the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_deepstack.config.choices import LoraTarget, Precision, Variant
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, ParallelConfig
from megatron_deepstack.convert.published import published_source, starting_weights
from megatron_deepstack.errors import DataError
from megatron_deepstack.model.published_shapes import decoder_shapes, published_shapes, shapes_of
from megatron_deepstack.run_folder.starting_weights import (
    DRAWN,
    StartingTensor,
    StartingWeights,
    read_starting_weights,
    write_starting_weights,
)
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_qwen3_vl

Pools = Callable[[int], RankPool]
ATTENTION = LoraConfig(rank=2, targets=(LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT))
MODELS = {
    "l": (tiny_model(), LoraConfig()),
    "hd-lora": (tiny_model(variant=Variant.DEEPSTACK_HD), LoraConfig(rank=2)),
    "llava-attention": (tiny_model(variant=Variant.LLAVA), ATTENTION),
    "qwen3-vl": (tiny_qwen3_vl(), ATTENTION),
}


def names_on_ranks(rank: int, model: ModelConfig, lora: LoraConfig) -> tuple[dict[str, torch.Tensor], dict]:
    """Every tensor that the ranks hold together, and what one of them works out alone."""
    from megatron_deepstack.model.build import build_model
    from megatron_deepstack.testing.compare import gather_published

    parallel = ParallelConfig(pipeline=2)
    groups = groups_for(parallel)
    built = build_model(model, parallel, Precision.FP32, groups, lora)
    held = gather_published(built, groups, lambda parameter: parameter)
    return held, {**shapes_of([built.encoder_rules]), **decoder_shapes(model, lora)}


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_names_the_whole_model(ranks: Pools, name: str) -> None:
    for held, known in ranks(2).run(names_on_ranks, *MODELS[name]):
        assert {key: tuple(value.shape) for key, value in held.items()} == known


def test_parts_of_several_files_and_what_is_drawn(tmp_path: Path) -> None:
    """A decoder in two files, a projector in a file of its own, and nothing for the tower."""
    model = tiny_model(variant=Variant.DEEPSTACK_HD)
    drawn = {name: torch.zeros(shape) for name, shape in published_shapes(model).items()}
    decoder = {
        name: value
        for name, value in drawn.items()
        if not name.startswith(("model.vision", "model.mm_", "model.image"))
    }
    projector = {name: value for name, value in drawn.items() if name.startswith("model.mm_")}
    first = dict(list(decoder.items())[:20])
    (tmp_path / "decoder").mkdir()
    save_file(first, tmp_path / "decoder" / "model-00001-of-00002.safetensors")
    rest = {name: value for name, value in decoder.items() if name not in first}
    save_file({**rest, "extra.weight": torch.zeros(1)}, tmp_path / "decoder" / "model-00002-of-00002.safetensors")
    index = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in [*decoder, "extra.weight"]}
    (tmp_path / "decoder" / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    torch.save(projector, tmp_path / "mm_projector.bin")
    source = published_source(
        [tmp_path / "decoder", tmp_path / "mm_projector.bin"],
        fallback=lambda name, shape: torch.ones(shape),
        model=model,
    )
    assert source("model.mm_projector.0.weight", tuple(drawn["model.mm_projector.0.weight"].shape)).sum() == 0
    found = starting_weights(published_shapes(model), source)
    assert [tensor.name for tensor in found.tensors] == list(published_shapes(model))
    by_part = {(one.part, one.place): (one.tensors, one.files) for one in found.origins(by_file=False)}
    assert by_part == {
        ("vision", DRAWN): (len(drawn) - len(decoder) - len(projector) - 1, 1),
        ("projector", str(tmp_path / "mm_projector.bin")): (4, 1),
        ("newline", DRAWN): (1, 1),
        ("language", str(tmp_path / "decoder")): (len(decoder), 2),
    }
    by_file = [one for one in found.origins(by_file=True) if one.part == "language"]
    assert sorted(one.tensors for one in by_file) == sorted([20, len(decoder) - 20])
    assert found.left_over == (f"{tmp_path}/decoder/model-00002-of-00002.safetensors: extra.weight",)
    lines = found.lines()
    assert lines[0] == "starting weights:"
    assert any(line.split()[0] == "language" and line.endswith(f"{tmp_path}/decoder (2 files)") for line in lines)
    assert any(line.split()[0] == "vision" and line.endswith("  drawn at random") for line in lines)
    assert lines[-1].startswith("  not used by the model: 1 tensor: ")


def test_the_list_is_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_starting_weights(tmp_path) is None
    one = StartingTensor(name="a", part="language", shape=(2, 3), file="f", name_in_file="b")
    weights = StartingWeights(tensors=(one, replace(one, name="c", file=None, name_in_file=None)), left_over=("f: d",))
    write_starting_weights(tmp_path, weights)
    assert read_starting_weights(tmp_path) == weights
    (tmp_path / "starting_weights.json").write_text('{"tensors": [{"name": 1}]}')
    with pytest.raises(DataError, match=r"starting_weights.json: cannot be read: .*delete it"):
        read_starting_weights(tmp_path)


def test_without_init_from_everything_is_drawn() -> None:
    model = tiny_model()
    found = starting_weights({**published_shapes(model), **decoder_shapes(model, LoraConfig(rank=2))}, None)
    assert {one.place for one in found.origins(by_file=True)} == {DRAWN}
    assert {one.part for one in found.origins(by_file=True)} == {"vision", "projector", "language", "adapters"}
