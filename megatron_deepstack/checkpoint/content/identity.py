"""What a resumed run must have in common with the run that wrote the checkpoint, and what it may change.

Layout, batch splitting, intervals and run length may change. Model, trained parts, data and order of data may not:
continuing with others would train something that no recipe describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.renamed import saved_model_with_present_names
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.errors import CheckpointError

_BEFORE: Mapping[str, Any] = {"lora": {"rank": 0}}
"""What older checkpoints, which do not say it, were made with."""


def identity(recipe: Recipe, *, plan_hash: str, tokenizer_sha256: str) -> dict[str, Any]:
    """The facts of a run, as plain JSON values. `plan_hash` and `tokenizer_sha256` are the store's."""
    train = recipe.train
    return {
        **model_identity(recipe),
        "train": {
            "seed": train.seed,
            "global_batch_size": train.global_batch_size,
            "seq_length": train.seq_length,
            "truncate": train.truncate,
            "precision": str(train.precision),
            **({"fp8_scaling": str(train.fp8_scaling)} if train.precision is Precision.FP8 else {}),
            "trainable": [str(part) for part in sorted(train.trainable)],
        },
        "data": {"plan_hash": plan_hash, "tokenizer_sha256": tokenizer_sha256},
    }


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of the identity that weights alone depend on."""
    model = asdict(recipe.model)
    del model["layers"]
    language = recipe.model.language
    if family_of(language) == family_of(replace(language, family=None)):
        model["language"]["family"] = None  # named or recognised, it is the same decoder
    lora = _plain(asdict(recipe.lora)) if recipe.lora.rank else {"rank": 0}
    return {"model": _plain(model), "lora": lora}


def require_same(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError that lists every fact of `ours` in which the checkpoint differs."""
    differences = list(_differences(_with_present_names({**_BEFORE, **saved}), ours, ""))
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another run:\n  {listed}\nUse the recipe it was made with "
            "(recipe.yaml in its folder), or another run_dir."
        )


def _with_present_names(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint of an earlier release may use earlier names of fields."""
    model = saved.get("model")
    return {**saved, "model": saved_model_with_present_names(model)} if isinstance(model, Mapping) else saved


def _differences(saved: Any, ours: Any, where: str) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(saved, Mapping):
        for key in ours:
            yield from _differences(saved.get(key), ours[key], f"{where}.{key}" if where else str(key))
    elif saved != ours:
        yield f"{where}: {saved!r} in the checkpoint, {ours!r} in the recipe"


def _plain(value: Any) -> Any:
    """JSON's idea of a value: tuples are lists, enums their text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value
