"""Scaled rotary positions: what each kind of scaling needs, and the factor that it gives attention scores.

The names are those of transformers' config.json; `model.layers.rotary` computes the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.problems import Problem
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig
from megatron_deepstack.config.sizes import head_width

SCALING_FIELDS: Final[Mapping[RopeType, tuple[str, ...]]] = {
    RopeType.DEFAULT: (),
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeType.YARN: (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Fields of `model.language.rope_scaling` that a kind reads."""
_NEEDED: Final = ("factor", "original_max_position_embeddings")


def scaling_values(scaling: RopeScalingConfig) -> dict[str, Any]:
    """Return the kind of a scaling and the fields that the kind reads, by name, as plain values."""
    read = {name: getattr(scaling, name) for name in SCALING_FIELDS[scaling.rope_type]}
    return {"rope_type": str(scaling.rope_type), **read}


def rope_problems(scaling: RopeScalingConfig) -> Iterator[Problem]:
    """Yield what is wrong with the section `model.language.rope_scaling`.

    Args:
        scaling: The section.

    Yields:
        A problem for each field that its kind needs and does not have, or has and does not read, and for bounds in the
        wrong order.
    """
    kind, plain = scaling.rope_type, RopeScalingConfig()
    for name in RopeScalingConfig.__dataclass_fields__:
        value, is_read = getattr(scaling, name), name in SCALING_FIELDS[kind]
        if is_read and name in _NEEDED and value is None:
            yield _problem((name, "rope_type"), f"not set, and {kind} needs it")
        elif name != "rope_type" and not is_read and value != getattr(plain, name):
            readers = " or ".join(other for other, names in SCALING_FIELDS.items() if name in names)
            text = f"found {value}, which {kind} does not read; leave it out, or set rope_type to {readers}"
            yield _problem((name, "rope_type"), text)
    for lower, upper in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if upper in SCALING_FIELDS[kind] and not getattr(scaling, lower) < getattr(scaling, upper):
            yield _problem((lower, upper), f"found {getattr(scaling, lower)}, expected less than {upper}")


def _problem(names: tuple[str, ...], text: str) -> Problem:
    return Problem(paths=tuple(f"model.language.rope_scaling.{name}" for name in names), text=text)


def score_factor(language: LanguageConfig) -> float | None:
    """Return the number by which products of queries and keys are multiplied.

    YaRN multiplies rotated queries and rotated keys by one factor each, and rotation covers whole heads, so that the
    scores are multiplied by its square.

    Args:
        language: The decoder.

    Returns:
        The number; None for the usual one, one over the root of the width of a head.
    """
    factor = _yarn_factor(language.rope_scaling)
    if factor == 1.0:
        return language.attention_multiplier
    usual = language.attention_multiplier or 1.0 / math.sqrt(head_width(language))
    return usual * factor**2


def _yarn_factor(scaling: RopeScalingConfig) -> float:
    """Equation 22 of the YaRN paper, and the ratio of two of them where a config weighs the logarithm."""
    if scaling.rope_type is not RopeType.YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor or 1.0)
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * growth + 1.0) / (scaling.mscale_all_dim * growth + 1.0)
    return growth + 1.0
