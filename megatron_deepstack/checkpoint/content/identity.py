"""What a resumed run must have in common with the run that wrote the checkpoint, and what it may change.

Layout, batch splitting, intervals and run length may change. Model, trained parts, data and order of data may not:
continuing with others would train something that no recipe describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_deepstack.checkpoint.folder import Manifest
from megatron_deepstack.config.choices import Precision
from megatron_deepstack.config.renamed import saved_model_with_present_names
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, Recipe
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.errors import CheckpointError

_BEFORE: Mapping[str, Any] = {"lora": {"rank": 0}}
"""What older checkpoints were made with, which do not say so themselves."""


def identity(recipe: Recipe, *, plan_hash: str, tokenizer_sha256: str) -> dict[str, Any]:
    """The facts of a run, as plain JSON values.

    Args:
        recipe: The run's recipe.
        plan_hash: Hash of the plan, as the store records it.
        tokenizer_sha256: SHA-256 of the tokenizer, as the store records it.

    Returns:
        The facts by section: those of `model_identity`, and `train` and `data`.
    """
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
    """The part of the identity that the weights depend on, as plain JSON values."""
    model = asdict(recipe.model)
    del model["layers"]
    language = recipe.model.language
    if family_of(language) == family_of(replace(language, family=None)):
        model["language"]["family"] = None  # named or recognised, it is the same decoder
    lora = _plain(asdict(recipe.lora)) if recipe.lora.rank else {"rank": 0}
    return {"model": _plain(model), "lora": lora}


def require_same(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare a checkpoint's facts with a recipe's.

    Args:
        path: The checkpoint, for the message.
        saved: Its facts; what `ours` does not ask for is passed over.
        ours: Facts of the recipe.

    Raises:
        CheckpointError: They differ; every fact that does is listed.
    """
    _require_none(path, [_in_words(*one) for one in differences(_with_present_names({**_BEFORE, **saved}), ours)])


def require_same_run(path: Path, manifest: Manifest, ours: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    """Compare the facts of the checkpoint that a run is to go on from with the run's own.

    Args:
        path: The checkpoint, for the message.
        manifest: Its manifest.
        ours: Facts of the run, as `identity` gives them.
        samples: What the run reads: `stores` and `num_samples`.

    Raises:
        CheckpointError: They differ. Of data the message says which stores then and now, and how many samples.
    """
    if manifest.weights_alone:
        require_same(path, _of_weights(_with_present_names(manifest.facts)), _of_weights(ours))
        return
    found = []
    for name, saved, mine in differences(_with_present_names({**_BEFORE, **manifest.facts}), ours):
        if name == "data.plan_hash":
            found.append(_other_samples(manifest.samples, samples))
        elif name == "data.tokenizer_sha256":
            found.append(
                "data: the checkpoint was trained on samples that another tokenizer has cut (sha256 "
                f"{str(saved)[:12]}, now {str(mine)[:12]}); set the store back, or preprocess with that tokenizer"
            )
        else:
            found.append(_in_words(name, saved, mine))
    _require_none(path, found)


def _of_weights(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tower and decoder are, with numbers that a recipe may leave out. Stacks and variant are the run's choice."""
    model = facts["model"]
    language = dict(model["language"])
    language["num_kv_heads"] = language["num_kv_heads"] or language["num_heads"]
    language["head_dim"] = language["head_dim"] or language["hidden_size"] // language["num_heads"]
    return {"model": {"vision": model["vision"], "language": language}}


def _other_samples(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    told = f"{then['num_samples']} samples of {_names(then)}" if then else "other samples"
    return (
        f"data: it was trained on {told}, and the recipe now reads {now['num_samples']} samples of {_names(now)}, "
        "which are not the same: other records, images, settings of `preprocess`, order or weights. A run goes on with "
        "the samples that it began with. Set data.store (or data.stores and weights) back to them, or train on the new "
        "ones in another run_dir, from these weights if you `export` them and name them in train.init_from"
    )


def _names(samples: Mapping[str, Any]) -> str:
    return " and ".join(map(str, samples["stores"])) or "no store"


def _require_none(path: Path, found: list[str]) -> None:
    if found:
        listed = "\n  ".join(found)
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another run:\n  {listed}\nUse the recipe it was made with "
            "(recipe.yaml in its folder), or another run_dir."
        )


def _with_present_names(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint of an earlier release may use earlier names of fields, and lacks fields that did not exist then.

    A new field's default leaves everything as it was, so that is what such a checkpoint was made with.
    """
    found = {**saved}
    if isinstance(saved.get("model"), Mapping):
        found["model"] = _filled(saved_model_with_present_names(saved["model"]), _plain(asdict(ModelConfig())))
    if isinstance(saved.get("lora"), Mapping):
        found["lora"] = _filled(saved["lora"], _plain(asdict(LoraConfig())))
    return found


def _filled(saved: Any, defaults: Any) -> Any:
    """`saved` with the defaults of the fields that it lacks, at any depth."""
    if not isinstance(saved, Mapping) or not isinstance(defaults, Mapping):
        return saved
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in saved.items()}}


def _in_words(name: str, saved: Any, ours: Any) -> str:
    return f"{name}: {saved!r} in the checkpoint, {ours!r} in the recipe"


def differences(saved: Any, ours: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two sets of facts differ.

    Args:
        saved: One of them.
        ours: The other one; what it does not hold is not compared.
        where: Path of both within what is compared.

    Yields:
        The path with dots, the value in `saved` (None where it is missing), the value in `ours`.
    """
    if isinstance(ours, Mapping) and isinstance(saved, Mapping):
        for key in ours:
            yield from differences(saved.get(key), ours[key], f"{where}.{key}" if where else str(key))
    elif saved != ours:
        yield where, saved, ours


def _plain(value: Any) -> Any:
    """A value as JSON would return it: tuples become lists, enums their text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value
