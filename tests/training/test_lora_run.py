"""A run with adapters from start to export: saved, resumed in another layout and with other rates, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import DataConfig, LanguageConfig, LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import CheckpointError, RankError
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_model, tiny_recipe
from megatron_deepstack.testing.tiny_data import record, write_photos, write_records, write_tokenizer
from orchestration.preprocess.driver.run import preprocess

Pools = Callable[[int], RankPool]
Tensors = dict[str, torch.Tensor]
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("lora")
    names = write_photos(folder / "images", 4)
    data = DataConfig(
        records=(str(write_records(folder / "records.json", [record(n, [name]) for n, name in enumerate(names)])),),
        images=str(folder / "images"),
        tokenizer=str(write_tokenizer(folder / "tokenizer.model")),
        store=str(folder / "store.zarr"),
    )
    language = LanguageConfig(
        vocab_size=512, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4, num_kv_heads=2
    )
    base = tiny_recipe(tiny_model(language=language), trainable=(Part.PROJECTOR, Part.LANGUAGE), global_batch_size=4)
    run = replace(base, data=data, train=replace(base.train, steps=4), lora=LORA)
    preprocess(run, str(data.store), workers=0)
    return run


def train_on_rank(rank: int, recipe: Recipe, stop_after: int | None) -> None:
    from megatron_deepstack.training.loop import run

    run(recipe, groups_for(recipe.parallel), stop_after)


def weights_on_rank(rank: int, recipe: Recipe, output: str | None) -> Tensors | None:
    """Published tensors of the newest checkpoint, adapters apart; with `output` exported as well."""
    from megatron_deepstack.convert.hf_names import Naming
    from megatron_deepstack.inference.export import export_on_rank
    from megatron_deepstack.inference.loading import load_engine
    from megatron_deepstack.testing.compare import gather_published

    groups = groups_for(recipe.parallel)
    weights = gather_published(load_engine(recipe, groups).model, groups, lambda parameter: parameter)
    if output is not None:
        export_on_rank(recipe, output, Naming.PUBLISHED, groups)
    return weights if rank == 0 else None


def losses_of(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


LAYOUTS = {
    "tp2-sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2-zero": ParallelConfig(distributed_optimizer=True),
}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.slow
def test_resuming_under_a_layout_is_exact(
    ranks: Pools, recipe: Recipe, tmp_path: Path, parallel: ParallelConfig
) -> None:
    """Bit for bit where the layout stays; one rank goes on from the same checkpoint to the same losses."""
    whole, halves = (replace(recipe, run_dir=str(tmp_path / name), parallel=parallel) for name in ("whole", "halves"))
    ranks(2).run(train_on_rank, whole, None)
    ranks(2).run(train_on_rank, halves, 2)
    saved = ranks(1).run(weights_on_rank, replace(halves, parallel=ParallelConfig()), None)[0]
    assert any(float(value.abs().max()) > 0 for name, value in saved.items() if "lora_B" in name)
    ranks(2).run(train_on_rank, halves, None)
    assert losses_of(tmp_path / "halves") == losses_of(tmp_path / "whole")
    other = replace(whole, run_dir=str(tmp_path / "other"))
    ranks(2).run(train_on_rank, other, 2)
    ranks(1).run(train_on_rank, replace(other, parallel=ParallelConfig()), None)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "whole"), rel=2e-5)


def test_rates_may_change_where_a_run_goes_on(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    run = replace(recipe, run_dir=str(tmp_path), parallel=ParallelConfig(pipeline=2))
    ranks(2).run(train_on_rank, run, 2)
    changed = replace(run, optimizer=replace(run.optimizer, lr=2e-3, projector_lr=1e-3, weight_decay=0.0))
    ranks(2).run(train_on_rank, changed, None)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["lr_by_part"]["language"] > 5e-3
    assert records[2]["lr_by_part"]["language"] <= 2e-3
    assert records[2]["lr_by_part"]["projector"] <= 1e-3


def test_an_export_is_the_base_with_its_adapters_added(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    """Another program reads the export and computes what this one does: weights W + alpha / rank * B A."""
    run = replace(recipe, run_dir=str(tmp_path / "run"), parallel=ParallelConfig(tensor=2))
    ranks(2).run(train_on_rank, run, None)
    one = replace(run, parallel=ParallelConfig())
    weights = ranks(1).run(weights_on_rank, one, str(tmp_path / "export"))[0]
    exported: Tensors = {}
    for file in (tmp_path / "export").glob("*.safetensors"):
        exported |= load_file(file)
    assert not [name for name in exported if "lora" in name]
    assert set(exported) == {name for name in weights if "lora_" not in name}
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    num_changed = 0
    for name, value in exported.items():
        expected, b = weights[name], name.replace(".weight", ".lora_B.weight")
        if b != name and b in weights:
            linear = name.split(".")[-2]
            a = name.replace(f"{linear}.weight", f"{fused.get(linear, linear)}.lora_A.weight")
            expected = expected + 2.0 * weights[b] @ weights[a]
            num_changed += int(not torch.equal(value, weights[name]))
        torch.testing.assert_close(value.float(), expected, rtol=1e-6, atol=1e-7)
    assert num_changed == 8 * 7


def test_a_checkpoint_of_other_adapters_is_refused(ranks: Pools, recipe: Recipe, tmp_path: Path) -> None:
    run = replace(recipe, run_dir=str(tmp_path))
    ranks(1).run(train_on_rank, run, 1)
    for lora, words in (
        (replace(LORA, rank=3), "lora.rank: 2 in the checkpoint, 3"),
        (LoraConfig(), "lora.rank: 2 in"),
    ):
        with pytest.raises(RankError) as caught:
            ranks(1).run(train_on_rank, replace(run, lora=lora), None)
        assert isinstance(caught.value.__cause__, CheckpointError)
        assert words in str(caught.value.__cause__)
