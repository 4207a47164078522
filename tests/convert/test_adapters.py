"""Adapters in PEFT's layout: the base export with the format's arithmetic is the merged export, in every dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_deepstack.config.choices import LoraTarget, Part, Precision, Variant
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ModelConfig, ParallelConfig, Recipe
from megatron_deepstack.convert.adapters import Adapter, write_adapters
from megatron_deepstack.convert.export import export_model
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.testing.ranks import RankPool, groups_for
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_recipe

pytestmark = pytest.mark.usefixtures("quiet_transformers")

Pools = Callable[[int], RankPool]
Tensors = dict[str, torch.Tensor]
GROUPED = LanguageConfig(
    vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=8, num_heads=4, num_kv_heads=2, qkv_bias=True
)
LORA = LoraConfig(rank=3, alpha=8.0)
EVERYWHERE = replace(LORA, vision_targets=tuple(LoraTarget), projector=True)
RUNS = {
    "l": (tiny_model(language=GROUPED), LORA),
    "hd-attention": (
        tiny_model(language=replace(GROUPED, qkv_bias=False), variant=Variant.DEEPSTACK_HD),
        replace(LORA, targets=(LoraTarget.QKV, LoraTarget.ATTENTION_OUTPUT)),
    ),
    "llava": (tiny_model(language=replace(GROUPED, qkv_bias=False), variant=Variant.LLAVA), LORA),
    "qwen3-vl": (tiny_qwen3_vl(), LORA),
    "qwen3-vl-everywhere": (tiny_qwen3_vl(), EVERYWHERE),
    "granite-everywhere": (tiny_granite(), EVERYWHERE),
}
ADAPTED = {
    "hd-attention": 8 * 4,
    "qwen3-vl-everywhere": 8 * 7 + 4 * 4 + 3 * 2,
    "granite-everywhere": 8 * 7 + 4 * 6 + 6 * 11,
}
"""Linears that have adapters: of decoder, tower, and mergers or Q-Formers; in the other runs all of eight layers."""


def recipe_of(model: ModelConfig, lora: LoraConfig) -> Recipe:
    vision = (Part.VISION,) * bool(lora.vision_targets)
    return replace(tiny_recipe(model, trainable=(*vision, Part.PROJECTOR, Part.LANGUAGE)), lora=lora)


def write_all(rank: int, recipe: Recipe, folder: str, precision: Precision, naming: Naming) -> None:
    """The three exports of one model whose adapters are not zero."""
    from megatron_deepstack.inference.export import write_adapters_alone
    from megatron_deepstack.model.build import build_model, drop_adapters, fill_model, merge_adapters
    from megatron_deepstack.model.init import random_source

    drawn, groups = random_source(recipe.model, 3), groups_for(ParallelConfig())

    def source(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("lora_B.weight"):
            return 0.3 * drawn(name.replace("lora_B", "lora_A"), shape)
        return drawn(name, shape)

    for name in ("merged", "left_out", "alone"):
        model = build_model(recipe.model, ParallelConfig(), precision, groups, recipe.lora)
        fill_model(model, source, groups.decoder.tp)
        output = Path(folder) / name
        if name == "alone":
            write_adapters_alone(model, recipe, output, naming)
        else:
            changed = merge_adapters(model) if name == "merged" else drop_adapters(model)
            export_model(changed, recipe.model, output, naming)


def applied(base: Tensors, adapters: Path) -> Tensors:
    """What PEFT's format says, on tensors by their names in memory: W + lora_alpha / r * B A, and replaced modules."""
    config = json.loads((adapters / "adapter_config.json").read_text())
    matrices = load_file(adapters / "adapter_model.safetensors")
    found = dict(base)
    used = set()
    for module in config["target_modules"]:
        a, b = (f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB")
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert matrices[a].shape[0] == matrices[b].shape[1] == rank
        name = f"{module}.weight"
        found[name] = (base[name].float() + alpha / rank * matrices[b].float() @ matrices[a].float()).to(
            base[name].dtype
        )
        used |= {a, b}
    for module in config["modules_to_save"] or ():
        for name in [key for key in matrices if key.startswith(f"base_model.model.{module}.")]:
            found[name.removeprefix("base_model.model.")] = matrices[name]
            used.add(name)
    assert used == set(matrices)
    return found


def in_memory(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("name", RUNS)
def test_base_and_adapters_are_the_merged_export(ranks: Pools, tmp_path: Path, name: str, precision: Precision) -> None:
    """Names are those of transformers' modules in memory, where PEFT looks for them."""
    model, lora = RUNS[name]
    ranks(1).run(write_all, recipe_of(model, lora), str(tmp_path), precision, Naming.HUGGING_FACE)
    assert sorted(file.name for file in (tmp_path / "alone").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base, merged = (dict(in_memory(tmp_path / kind).named_parameters()) for kind in ("left_out", "merged"))
    found = applied({key: value.detach() for key, value in base.items()}, tmp_path / "alone")
    assert found.keys() == merged.keys()
    changed = [key for key in found if not torch.equal(base[key], merged[key])]
    assert len(changed) == ADAPTED.get(name, 8 * 7)
    for key, value in found.items():
        # bfloat16: one rounding to the nearest after sums in another order
        torch.testing.assert_close(
            value, merged[key].detach(), rtol=8e-3 if value.dtype.itemsize == 2 else 1e-6, atol=1e-7
        )


def test_published_names_are_those_of_the_published_export(ranks: Pools, tmp_path: Path) -> None:
    model, lora = RUNS["l"]
    ranks(1).run(write_all, recipe_of(model, lora), str(tmp_path), Precision.FP32, Naming.PUBLISHED)
    base, merged = (load_file(tmp_path / kind / "model.safetensors") for kind in ("left_out", "merged"))
    for key, value in applied(base, tmp_path / "alone").items():
        torch.testing.assert_close(value, merged[key], rtol=1e-6, atol=1e-7)


def test_ranks_and_scalings_may_differ(tmp_path: Path) -> None:
    """The commonest are the adapter's; the others have patterns. Matrices may share memory."""
    drawn = torch.randn(2, 5)
    plain = [Adapter(module=f"layers.{n}.q", a=drawn, b=torch.randn(3, 2), scaling=0.5) for n in range(2)]
    other = Adapter(module="tower.layers.0.fc", a=torch.randn(4, 5), b=torch.randn(6, 4), scaling=0.3)
    write_adapters(tmp_path, [*plain, other], base="there")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    assert config["rank_pattern"] == {"tower.layers.0.fc": 4}
    assert config["alpha_pattern"] == {"tower.layers.0.fc": 1.2}
    assert config["modules_to_save"] is None
    assert config["base_model_name_or_path"] == "there"
    zeros = {"layers.0.q": (3, 5), "layers.1.q": (3, 5), "tower.layers.0.fc": (6, 5)}
    found = applied({f"{key}.weight": torch.zeros(shape) for key, shape in zeros.items()}, tmp_path)
    torch.testing.assert_close(found["tower.layers.0.fc.weight"], 0.3 * other.b @ other.a)
    torch.testing.assert_close(found["layers.1.q.weight"], 0.5 * plain[1].b @ drawn)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    from megatron_deepstack.cli.run_verbs import export
    from megatron_deepstack.config.load import recipe_to_yaml
    from megatron_deepstack.inference.export import Adapters, export_run

    with pytest.raises(ConfigError, match="--adapters: found 'apart', expected merged, left_out or alone"):
        export(tmp_path, tmp_path / "out", adapters="apart")
    run = replace(tiny_recipe(tiny_model()), run_dir=str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(run))
    with pytest.raises(ConfigError, match=r"--adapters alone: .* was trained without LoRA \(lora.rank is 0\); leave"):
        export_run(tmp_path, tmp_path / "out", adapters=Adapters.ALONE)
