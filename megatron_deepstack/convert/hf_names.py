"""Hugging Face's names of tensors, and the published names that `model.weights` speaks.

The same tensor has several names: a checkpoint of a decoder or a vision tower alone, `LlavaForConditionalGeneration`
in memory and, with other prefixes, on disk. They differ in prefixes only, so a table of prefixes is the whole mapping;
the longest one that fits a name decides. A tower or a family that names its tensors otherwise has a table of its own in
`config.traits`, which is tried before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache

from megatron_deepstack.config.choices import Part
from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.traits.families import family_of
from megatron_deepstack.config.traits.towers import HfTensor, tower_of
from megatron_deepstack.convert.hf_whole import whole_model_of
from megatron_deepstack.convert.stacked_experts import names_in_stack
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.model.weights import PROJECTOR_PREFIX, VISION_PREFIX

NEWLINE = "model.image_newline"
_LINEAR_1, _LINEAR_2 = f"{PROJECTOR_PREFIX}0.", f"{PROJECTOR_PREFIX}2."

_TO_PUBLISHED: Mapping[str, str] = {
    # decoders: LlamaForCausalLM and its kin, then the bare LlamaModel
    "model.embed_tokens.": "model.embed_tokens.",
    "model.layers.": "model.layers.",
    "model.norm.": "model.norm.",
    "lm_head.": "lm_head.",
    "embed_tokens.": "model.embed_tokens.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
    # vision towers: CLIPModel and SiglipModel, then the tower alone as transformers 5 writes it
    "vision_model.": VISION_PREFIX,
    "embeddings.": f"{VISION_PREFIX}embeddings.",
    "encoder.": f"{VISION_PREFIX}encoder.",
    "pre_layrnorm.": f"{VISION_PREFIX}pre_layrnorm.",
    "post_layernorm.": f"{VISION_PREFIX}post_layernorm.",
    # LLaVA's own checkpoints, which DeepStack's follow
    VISION_PREFIX: VISION_PREFIX,
    PROJECTOR_PREFIX: PROJECTOR_PREFIX,
    NEWLINE: NEWLINE,
    # LlavaForConditionalGeneration and LlavaNextForConditionalGeneration, in memory
    "model.language_model.": "model.",
    "model.vision_tower.": VISION_PREFIX,
    "model.vision_tower.vision_model.": VISION_PREFIX,
    "model.multi_modal_projector.linear_1.": _LINEAR_1,
    "model.multi_modal_projector.linear_2.": _LINEAR_2,
    # and on disk
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": VISION_PREFIX,
    "vision_tower.vision_model.": VISION_PREFIX,
    "multi_modal_projector.linear_1.": _LINEAR_1,
    "multi_modal_projector.linear_2.": _LINEAR_2,
    "image_newline": NEWLINE,
}


class Naming(StrEnum):
    """Under which names an exported checkpoint is written."""

    PUBLISHED = "published"
    """Those of the DeepStack and LLaVA releases; every variant."""
    HUGGING_FACE = "hugging_face"
    """Those transformers reads: LLaVA's for variant llava, for the others those of the code in `convert.hf_folder`."""


_TO_LLAVA: Mapping[str, str] = {
    "model.embed_tokens.": "language_model.model.embed_tokens.",
    "model.layers.": "language_model.model.layers.",
    "model.norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
    VISION_PREFIX: "vision_tower.vision_model.",
    _LINEAR_1: "multi_modal_projector.linear_1.",
    _LINEAR_2: "multi_modal_projector.linear_2.",
}
"""To LLaVA's names on disk, which transformers has read since it knows LLaVA and still writes."""
_TO_DEEPSTACK: Mapping[str, str] = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
    VISION_PREFIX: "model.vision_tower.",
    _LINEAR_1: "model.multi_modal_projector.linear_1.",
    _LINEAR_2: "model.multi_modal_projector.linear_2.",
    NEWLINE: NEWLINE,
}
"""To the names of `convert.hf_folder`, in memory and on disk. A tower keeps its published names, whatever its kind."""


_AROUND_TOWER = ("", "vision_model.", "model.vision_tower.", "vision_tower.")
"""Prefixes under which a checkpoint may hold a tower whose tensors have names of their own."""
_AROUND_DECODER = {"": "", "model.language_model.": "model.", "language_model.": ""}
"""Prefixes around a decoder, and what stands there in a checkpoint of the decoder alone."""


def to_published(name: str, model: ModelConfig | None = None) -> str | None:
    """The published name of a tensor.

    Args:
        name: Its name in any of the namings above.
        model: The recipe's model, whose tower and decoder may have tables of names of their own.

    Returns:
        The published name; None for a tensor that no model of ours holds.
    """
    if model is not None:
        own = _own_to_published(name, model)
        if own is not None:
            return own
        whole = whole_model_of(model.variant)
        if whole is not None:
            renamed = _renamed(name, whole[1].prefixes)
            return _renamed(name, _TO_PUBLISHED) if renamed is None else renamed
    return _renamed(name, _TO_PUBLISHED)


def _own_to_published(name: str, model: ModelConfig) -> str | None:
    tower = {theirs.name: VISION_PREFIX + ours for ours, theirs in _tower_tensors(model).items()}
    decoder = {theirs: ours for ours, theirs in _decoder_tensors(model).items()}
    for around in _AROUND_TOWER if tower else ():
        found = _by_template(name.removeprefix(around), tower) if name.startswith(around) else None
        if found is not None:
            return found
    for around, alone in _AROUND_DECODER.items() if decoder else ():
        found = _by_template(alone + name.removeprefix(around), decoder) if name.startswith(around) else None
        if found is not None:
            return found
    return None


def _tower_tensors(model: ModelConfig) -> Mapping[str, HfTensor]:
    known = tower_of(model.vision).hugging_face
    return {} if known is None else known.tensors


def _decoder_tensors(model: ModelConfig) -> Mapping[str, str]:
    known = family_of(model.language).hugging_face
    return {} if known is None else known.tensors


def _by_template(name: str, templates: Mapping[str, str]) -> str | None:
    """`name` with its beginning replaced by the longest template that fits; `{n}` is the same number in both."""
    for template in sorted(templates, key=len, reverse=True):
        match = _pattern(template).match(name)
        if match is not None:
            number = match.groupdict().get("n", "")
            return templates[template].replace("{n}", number) + name[match.end() :]
    return None


@lru_cache(maxsize=512)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)"))


def leading_ones(published: str, model: ModelConfig) -> int:
    """How many dimensions of size 1 Hugging Face's LLaVA has before those of a published tensor.

    Args:
        published: The tensor's published name.
        model: The recipe's model, whose tower may have tensors of another shape.
    """
    local = published.removeprefix(VISION_PREFIX)
    fitting = [ours for ours in _tower_tensors(model) if local != published and _pattern(ours).match(local)]
    return _tower_tensors(model)[max(fitting, key=len)].leading_ones if fitting else 0


def to_naming(published: str, naming: Naming, model: ModelConfig | None = None) -> str:
    """The name under which a published tensor is exported.

    Args:
        published: Its published name.
        naming: Whose names the export has.
        model: The recipe's model, whose tower and decoder may have tables of names of their own.

    Raises:
        AssertionError: The model at Hugging Face has no such tensor.
    """
    if naming is Naming.PUBLISHED:
        return published
    if model is not None and not model.variant.traits.is_llava and model.variant.traits.whole_model is None:
        decoder = {ours: f"model.language_{theirs}" for ours, theirs in _decoder_tensors(model).items()}
        own = _by_template(published, decoder) or _renamed(published, _TO_DEEPSTACK)
        assert own is not None, f"{published}: the exported model has no such tensor"
        return own
    if model is not None:
        tower = {VISION_PREFIX + ours: f"vision_tower.{theirs.name}" for ours, theirs in _tower_tensors(model).items()}
        decoder = {ours: f"language_model.{theirs}" for ours, theirs in _decoder_tensors(model).items()}
        own = _by_template(published, {**tower, **decoder})
        if own is not None:
            return own
        whole = whole_model_of(model.variant)
        if whole is not None:
            named = _renamed(published, {ours: theirs for theirs, ours in whole[1].prefixes.items()})
            assert named is not None, f"{published}: {whole[1].architecture} has no such tensor"
            return named
    renamed = _renamed(published, _TO_LLAVA)
    assert renamed is not None, f"{published}: LlavaForConditionalGeneration has no such tensor"
    return renamed


def _renamed(name: str, prefixes: Mapping[str, str]) -> str | None:
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return prefixes[longest] + name.removeprefix(longest)


def by_published_name(names: Iterable[str], where: str, model: ModelConfig | None = None) -> dict[str, str]:
    """The tensors of a checkpoint by their published names.

    Args:
        names: All names of the checkpoint.
        where: The checkpoint, for the message.
        model: The recipe's model, see `to_published`.

    Returns:
        Published name to the name in the checkpoint, for all tensors that have a published name.

    Raises:
        CheckpointError: Two names of the checkpoint mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        published = to_published(name, model)
        num_experts = 0 if model is None else model.language.num_experts
        for one in () if published is None else names_in_stack(published, num_experts):
            if one in found:
                raise CheckpointError(
                    f"{where}: {found[one]} and {name} are both {one}; a checkpoint may hold one model only"
                )
            found[one] = name
    return found


def part_of(published: str) -> Part | None:
    """The part a published tensor belongs to; None for the newline, which no other tensor comes with."""
    if published == NEWLINE:
        return None
    if published.startswith(VISION_PREFIX):
        return Part.VISION
    return Part.PROJECTOR if published.startswith(PROJECTOR_PREFIX) else Part.LANGUAGE
