"""Hugging Face's names of tensors, and the published names that `model.weights` speaks.

The same tensor has several names: a checkpoint of a decoder or a vision tower alone, `LlavaForConditionalGeneration`
in memory and, with other prefixes, on disk. They differ in prefixes only, so a table of prefixes is the whole mapping;
the longest one that fits a name decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from megatron_deepstack.config.choices import Part
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
    """Those `LlavaForConditionalGeneration.from_pretrained` reads; variant llava only."""


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


def to_published(name: str) -> str | None:
    """The published name of a tensor in any of the namings above; None for one that no model of ours holds."""
    return _renamed(name, _TO_PUBLISHED)


def to_naming(published: str, naming: Naming) -> str:
    """The name under which a published tensor is exported."""
    if naming is Naming.PUBLISHED:
        return published
    renamed = _renamed(published, _TO_LLAVA)
    assert renamed is not None, f"{published}: LlavaForConditionalGeneration has no such tensor"
    return renamed


def _renamed(name: str, prefixes: Mapping[str, str]) -> str | None:
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return prefixes[longest] + name.removeprefix(longest)


def by_published_name(names: Iterable[str], where: str) -> dict[str, str]:
    """Published name to the name in a checkpoint, for all tensors that have one.

    Raises CheckpointError if two names of the checkpoint mean the same tensor; `where` names the checkpoint.
    """
    found: dict[str, str] = {}
    for name in names:
        published = to_published(name)
        if published in found:
            raise CheckpointError(
                f"{where}: {found[published]} and {name} are both {published}; a checkpoint may hold one model only"
            )
        if published is not None:
            found[published] = name
    return found


def part_of(published: str) -> Part | None:
    """The part a published tensor belongs to; None for the newline, which no other tensor comes with."""
    if published == NEWLINE:
        return None
    if published.startswith(VISION_PREFIX):
        return Part.VISION
    return Part.PROJECTOR if published.startswith(PROJECTOR_PREFIX) else Part.LANGUAGE
