"""Keys of a decoder's config that mean something only together: those of rotary positions and of attention windows.

Our decoders rotate whole heads, by positions whose frequencies may be scaled once and for all, and every token sees all
tokens before it. Scaling that changes with the length of a sequence (`dynamic`, `longrope`) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.rope_scaling import SCALING_FIELDS, scaling_values
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig
from megatron_deepstack.config.traits.families import HfDecoder

ROPE_KEYS: Final = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)
"""Keys that `rope_differences` compares."""
WINDOW_KEYS: Final = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_THETA = 10000.0
"""What transformers takes where a tower's config names no base."""
_SECTIONS: Final = (24, 20, 20)
"""What transformers takes where a decoder with three axes names no sections."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def rotary_base(text: Mapping[str, Any], known: HfDecoder) -> Any:
    """The base of a decoder's rotary positions, as transformers reads it.

    Args:
        text: A decoder's config.
        known: What its family takes where the config names none.
    """
    given = _rotary(text).get("rope_theta", text.get("rope_theta"))
    return known.default_theta if given is None else given


def rotary_sections(text: Mapping[str, Any]) -> Any:
    """The sections of a decoder's three axes, or the published ones where the config names none."""
    return _rotary(text).get("mrope_section", list(_SECTIONS))


def axial_base(vision: Mapping[str, Any]) -> Any:
    """The base of a tower's rotary positions, as transformers reads it."""
    given = _rotary(vision).get("rope_theta", vision.get("rope_theta"))
    return _THETA if given is None else given


def axial_differences(vision: Mapping[str, Any], theta: float) -> Iterator[str]:
    """How the rotary positions of a tower's config differ from the recipe's, which are axial.

    Args:
        vision: A tower's config.
        theta: The recipe's base.

    Yields:
        One line for each difference.
    """
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in (vision.get(key) or {}).items():
            if name in ("rope_type", "type") and value not in ("axial", "default"):
                yield f"vision_config.{key}.{name}: found {value!r}, computed is 'axial'"
            elif name not in ("rope_type", "type", "rope_theta") and value is not None:
                yield f"vision_config.{key}.{name}: found {value!r}, a key that is not known here"
    if axial_base(vision) != theta:
        yield f"model.vision.rope_theta: {axial_base(vision)!r} in the checkpoint, {theta!r} in the recipe"


def _rotary(config: Mapping[str, Any]) -> Mapping[str, Any]:
    given = config.get("rope_scaling") or config.get("rope_parameters")
    return given if isinstance(given, Mapping) else {}


def rope_scaling(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `model.language.rope_scaling` that a decoder's config asks for, as transformers reads it.

    Args:
        text: A decoder's config.

    Returns:
        `rope_type` and what its kind reads, as far as the config says it. A kind that is not computed here is returned
        alone.
    """
    given = _rotary(text)
    kind = _kind(given)
    names = SCALING_FIELDS[RopeType(kind)] if kind in set(RopeType) else ()
    found = {name: given[name] for name in names if given.get(name) is not None}
    longest, original = text.get("max_position_embeddings"), "original_max_position_embeddings"
    if original in names:
        found |= {original: text.get(original) or found.get(original, longest)}
        if kind == RopeType.YARN and "factor" not in found and found[original] and longest:
            found["factor"] = longest / found[original]
    return {"rope_type": kind, **found}


def written_rope(language: LanguageConfig) -> dict[str, Any]:
    """The keys of a decoder's config that `rope_differences` compares, for all readers.

    Args:
        language: The recipe's decoder.

    Returns:
        `rope_parameters` as transformers 5 has it; and as earlier releases and other programs read them, `rope_theta`
        and, where positions are scaled, `rope_scaling`. Where it finds that one, transformers 5 looks for the base
        beside it, and not in `rope_parameters`.
    """
    scaling = {name: value for name, value in scaling_values(language.rope_scaling).items() if value is not None}
    axes = (
        {}
        if language.mrope_section is None
        else {"mrope_section": list(language.mrope_section), "mrope_interleaved": True}
    )
    parameters = {**scaling, "rope_theta": language.rope_theta, **axes}
    scaled = language.rope_scaling.rope_type is not RopeType.DEFAULT
    return {
        "rope_theta": language.rope_theta,
        "rope_parameters": parameters,
        **({"rope_scaling": {**scaling, **axes}} if scaled else {}),
    }


def _kind(given: Mapping[str, Any]) -> str:
    return str(given.get("rope_type") or given.get("type") or RopeType.DEFAULT)


def rope_differences(text: Mapping[str, Any], language: LanguageConfig, known: HfDecoder) -> Iterator[str]:
    """How the rotary positions of a config differ from those that the recipe computes.

    Args:
        text: A decoder's config. Older ones have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
        language: The recipe's decoder.
        known: What its family takes where the config names no base.

    Yields:
        One line for each difference.
    """
    bases = []
    axial = language.mrope_section is not None
    if axial and list(rotary_sections(text)) != list(language.mrope_section or ()):
        theirs = rotary_sections(text)
        yield f"model.language.mrope_section: {theirs!r} in the checkpoint, {language.mrope_section!r} in the recipe"
    for key in ("rope_parameters", "rope_scaling"):
        given = text.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            yield f"{key}: found {given!r}, expected keys such as rope_type"
            continue
        kind = _kind(given)
        if kind not in set(RopeType):
            computed = ", ".join(RopeType)
            yield f"{key}: found {dict(given)!r}; positions scaled as {kind!r} are not computed here, only {computed}"
            return
        if given.get("rope_theta") is not None:
            bases.append(given["rope_theta"])
        yield from _unknown_rope_keys(key, given, axial=axial)
    if text.get("rope_theta") is not None:
        bases.append(text["rope_theta"])
    yield from _whole_heads("partial_rotary_factor", text.get("partial_rotary_factor"))
    yield from _scaling_differences(text, language)
    for base in bases or [known.default_theta]:
        if base != language.rope_theta:
            yield f"model.language.rope_theta: {base!r} in the checkpoint, {language.rope_theta!r} in the recipe"
            return


def _unknown_rope_keys(key: str, given: Mapping[str, Any], *, axial: bool) -> Iterator[str]:
    """Keys of a section about positions that mean nothing here."""
    read = {"rope_type", "type", "rope_theta", *SCALING_FIELDS[RopeType(_kind(given))]}
    read |= {"mrope_section"} if axial else set()
    for name, value in given.items():
        if axial and name == "mrope_interleaved" and value is True:
            continue
        if name == "partial_rotary_factor":
            yield from _whole_heads(f"{key}.{name}", value)
        elif name not in read and value is not None:
            yield f"{key}.{name}: found {value!r}, a key that is not known here and may change the positions"


def _scaling_differences(text: Mapping[str, Any], language: LanguageConfig) -> Iterator[str]:
    ours, asked = scaling_values(language.rope_scaling), rope_scaling(text)
    unsaid = RopeScalingConfig()
    theirs = {name: getattr(unsaid, name) for name in SCALING_FIELDS[RopeType(asked["rope_type"])]} | asked
    for name in dict.fromkeys((*theirs, *ours)):
        mine, other = ours.get(name, getattr(unsaid, name)), theirs.get(name, getattr(unsaid, name))
        if other != mine:
            yield f"model.language.rope_scaling.{name}: {other!r} in the checkpoint, {mine!r} in the recipe"


def _whole_heads(key: str, value: Any) -> Iterator[str]:
    if value is not None and value != 1:
        yield f"{key}: found {value!r}, computed is 1.0: positions rotate whole heads"


def window_differences(
    text: Mapping[str, Any], known: HfDecoder, num_layers: int, seq_length: int | None
) -> Iterator[str]:
    """How the attention of a config differs from ours, in which every token sees all tokens before it.

    Args:
        text: A decoder's config.
        known: What its family makes of an absent key.
        num_layers: Layers of the recipe's decoder.
        seq_length: Longest sequence of the run, or None where it is not known; a window as long makes no difference.

    Yields:
        One line for each difference.
    """
    kinds = text.get("layer_types")
    if kinds is not None and (not isinstance(kinds, Sequence) or not set(kinds) <= {_FULL, _SLIDING}):
        others = sorted(set(map(str, kinds)) - {_FULL, _SLIDING}) if isinstance(kinds, Sequence) else kinds
        yield f"layer_types: found {others!r}, computed is {_FULL!r} in every layer"
        return
    window = text.get("sliding_window", known.default_window)
    listed = kinds is not None and _SLIDING in kinds
    if known.has_window_switch:
        slides = listed if kinds is not None else bool(text.get("use_sliding_window")) and _slides(text, num_layers)
    else:
        slides = listed or window is not None
    if not slides or (window is None and not listed):
        return
    if not isinstance(window, int) or seq_length is None or window < seq_length:
        length = "an unknown length" if seq_length is None else f"{seq_length} (train.seq_length)"
        yield (
            f"sliding_window: found {window!r}, so that a token sees that many before it, computed is all of "
            f"{length}; use train.seq_length={window} or less, or a checkpoint without a window"
        )


def _slides(text: Mapping[str, Any], num_layers: int) -> bool:
    """Whether any layer has the window, where a config does not list the layers: those from a number on have it."""
    first = text.get("max_window_layers")
    return not isinstance(first, int) or first < num_layers
