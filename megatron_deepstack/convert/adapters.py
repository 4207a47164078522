"""LoRA adapters alone, in the layout of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT finds the linears that it adapts by their names in the model, and adds to each one `scaling * B A x`. Where a
linear of ours has one A for several outputs (query, key and value; gate and up), each of them gets a copy of it,
because PEFT knows them as separate linears. Modules that learned as a whole, such as a projector, are
`modules_to_save`.

The writer takes names and matrices, and does not ask what kind of linear they belong to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.hf_names import Naming, to_naming
from megatron_deepstack.model.build import RankModel
from megatron_deepstack.model.layers.lora import WithAdapter

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_MODEL: Final = "adapter_model.safetensors"
_WRAPPED: Final = "base_model.model."
"""What PEFT writes before the name of a module of the model that it wraps."""
_B: Final = ".lora_B.weight"
_IN_MEMORY: Final[Mapping[str, str]] = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.vision_model.": "model.vision_tower.",
}
"""Prefixes of LLaVA's modules in files, and in transformers 5's memory, where PEFT looks for them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """The adapter of one linear: y = W x + scaling * B A x."""

    module: str
    """Name of the linear."""
    a: torch.Tensor
    """(R, inputs)."""
    b: torch.Tensor
    """(outputs, R)."""
    scaling: float


def adapters_of(rank_model: RankModel) -> Iterator[Adapter]:
    """The adapters of a model that this rank holds whole. Not collective.

    Args:
        rank_model: The model, without tensor parallelism and with one stage.

    Yields:
        The adapter of each linear that other programs know, under the linear's published name; matrices on the CPU, in
        the dtype that they have.
    """
    parts: list[tuple[torch.nn.Module, Any]] = [(rank_model.encoder, rank_model.encoder_rules)]
    parts += list(zip(rank_model.chunks, rank_model.chunk_rules, strict=True))
    for part, rules in parts:
        for name, linear in part.named_modules():
            if isinstance(linear, WithAdapter):
                (a,) = rules[f"{name}.lora_a"].published([linear.lora_a.detach().cpu()])
                for own in linear.b_names:
                    rule = rules[f"{name}.{own}"]
                    found = rule.published([linear.get_parameter(own).detach().cpu()])
                    for published, b in zip(rule.names, found, strict=True):
                        scaling = linear.lora.alpha / linear.lora.rank
                        yield Adapter(module=published.removesuffix(_B), a=a, b=b, scaling=scaling)


def module_name(published: str, naming: Naming, model: ModelConfig) -> str:
    """The name of a module in the model that others load from an export.

    Args:
        published: Its published name, or that of one of its tensors.
        naming: Whose names the export has.
        model: The recipe's model.

    Returns:
        The name in memory. It differs from the one in files where transformers renames tensors as it loads them.
    """
    name = to_naming(published, naming, model)
    if naming is Naming.PUBLISHED or not model.variant.traits.is_llava:
        return name
    prefix = next((prefix for prefix in _IN_MEMORY if name.startswith(prefix)), "")
    return _IN_MEMORY.get(prefix, "") + name.removeprefix(prefix)


def write_adapters(
    folder: Path,
    adapters: Sequence[Adapter],
    *,
    whole: Mapping[str, torch.Tensor] | None = None,
    base: str | None = None,
) -> None:
    """Write adapters as PEFT reads them.

    Ranks and scalings may differ from linear to linear: the commonest are the adapter's, others stand in
    `rank_pattern` and `alpha_pattern`.

    Args:
        folder: Where the files are written; it must be there.
        adapters: At least one; `module` is the linear's name in the model that is adapted.
        whole: Tensors of modules that replace those of the model, by their names in it.
        base: Folder or name of the model that they belong to, for `base_model_name_or_path`.

    Raises:
        OSError: The file system is full or may not be written.
    """
    whole = whole or {}
    tensors = {f"{_WRAPPED}{name}": tensor for name, tensor in whole.items()}
    for adapter in adapters:
        tensors[f"{_WRAPPED}{adapter.module}.lora_A.weight"] = adapter.a
        tensors[f"{_WRAPPED}{adapter.module}{_B}"] = adapter.b
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, folder / ADAPTER_MODEL, metadata={"format": "pt"})
    config = _config(adapters, sorted({name.rpartition(".")[0] for name in whole}), base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(adapters: Sequence[Adapter], whole: list[str], base: str | None) -> dict[str, Any]:
    ranks = {adapter.module: len(adapter.a) for adapter in adapters}
    alphas = {adapter.module: _number(adapter.scaling * len(adapter.a)) for adapter in adapters}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": list(ranks),  # whole names: `q_proj` alone would also be the vision tower's
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "modules_to_save": whole or None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> float | int:
    """PEFT's configs hold whole numbers as such."""
    rounded = round(value)
    return rounded if abs(value - rounded) < 1e-9 * max(1.0, abs(value)) else value
