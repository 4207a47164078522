"""Keys of a decoder's config that mean something only together: those of rotary positions and of attention windows.

Our decoders rotate whole heads by unscaled positions, and every token sees all tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.config.traits.families import HfDecoder

ROPE_KEYS: Final = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
WINDOW_KEYS: Final = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_THETA = 10000.0
"""What transformers takes where a config names no base."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def rope_differences(text: Mapping[str, Any], language: LanguageConfig) -> Iterator[str]:
    """How the rotary positions of a config differ from those that the recipe computes.

    Args:
        text: A decoder's config. Older ones have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
        language: The recipe's decoder.

    Yields:
        One line for each difference.
    """
    bases = []
    for key in ("rope_parameters", "rope_scaling"):
        given = text.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            yield f"{key}: found {given!r}, expected keys such as rope_type"
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            yield f"{key}: found {dict(given)!r}; positions scaled as {kind!r} are not computed here, only 'default'"
            continue
        if given.get("rope_theta") is not None:
            bases.append(given["rope_theta"])
        for name, value in given.items():
            if name == "partial_rotary_factor":
                yield from _whole_heads(f"{key}.{name}", value)
            elif name not in ("rope_type", "type", "rope_theta") and value is not None:
                yield f"{key}.{name}: found {value!r}, a key that is not known here and may change the positions"
    if text.get("rope_theta") is not None:
        bases.append(text["rope_theta"])
    yield from _whole_heads("partial_rotary_factor", text.get("partial_rotary_factor"))
    for base in bases or [_THETA]:
        if base != language.rope_theta:
            yield f"model.language.rope_theta: {base!r} in the checkpoint, {language.rope_theta!r} in the recipe"
            return


def rope_base(text: Mapping[str, Any]) -> float:
    """The base of a decoder's rotary positions, by its config; transformers' default where it names none."""
    for key in ("rope_parameters", "rope_scaling"):
        given = text.get(key)
        if isinstance(given, Mapping) and given.get("rope_theta") is not None:
            return float(given["rope_theta"])
    return float(text.get("rope_theta") or _THETA)


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
