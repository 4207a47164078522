"""Frequencies of scaled positions: bit for bit those of transformers."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_deepstack.config.architectures import LANGUAGE
from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.rope_scaling import rope_problems, score_factor
from megatron_deepstack.config.schema import LanguageConfig, RopeScalingConfig
from megatron_deepstack.config.sizes import head_width
from megatron_deepstack.model.layers.rotary import inverse_frequencies

YARN = RopeScalingConfig(rope_type=RopeType.YARN, factor=4.0, original_max_position_embeddings=32768)
CASES = {
    **{name: shape for name, shape in LANGUAGE.items() if shape.rope_scaling.rope_type is not RopeType.DEFAULT},
    "qwen3 with yarn": replace(LANGUAGE["qwen3_8b"], rope_scaling=YARN),
    "bounds not rounded": LanguageConfig(rope_scaling=replace(YARN, truncate=False, beta_fast=24.0, beta_slow=2.0)),
    "narrow heads": LanguageConfig(hidden_size=32, num_heads=4, rope_scaling=replace(YARN, factor=40.0)),
    "factor given": LanguageConfig(rope_scaling=replace(YARN, attention_factor=1.5)),
    "logarithm weighed": LanguageConfig(rope_scaling=replace(YARN, mscale=0.7, mscale_all_dim=1.2)),
    "one weight alone": LanguageConfig(rope_scaling=replace(YARN, mscale=0.7)),
    "smaller multiplier": LanguageConfig(rope_scaling=YARN, attention_multiplier=0.1),
    "long original": LanguageConfig(
        rope_scaling=RopeScalingConfig(
            rope_type=RopeType.LLAMA3,
            factor=3.5,
            original_max_position_embeddings=100_000,
            low_freq_factor=2.0,
            high_freq_factor=16.0,
        )
    ),
}


@pytest.mark.usefixtures("quiet_transformers")
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    language = CASES[name]
    said = {key: value for key, value in asdict(language.rope_scaling).items() if value is not None}
    config = LlamaConfig(
        head_dim=head_width(language),
        max_position_embeddings=1 << 20,
        rope_parameters={**said, "rope_type": str(said["rope_type"]), "rope_theta": language.rope_theta},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[said["rope_type"]](config, torch.device("cpu"))
    assert torch.equal(inverse_frequencies(language).cpu(), expected)
    usual = language.attention_multiplier or head_width(language) ** -0.5
    assert (score_factor(language) or usual) == pytest.approx(usual * factor**2, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (RopeScalingConfig(rope_type=RopeType.LINEAR), ["factor, rope_type: not set, and linear needs it"]),
        (
            RopeScalingConfig(rope_type=RopeType.YARN),
            ["factor, rope_type: not set, and yarn", "original_max_position_embeddings, rope_type: not set, and yarn"],
        ),
        (
            RopeScalingConfig(factor=4.0),
            ["factor, rope_type: found 4.0, which default does not read; leave it out"],
        ),
        (
            RopeScalingConfig(rope_type=RopeType.LINEAR, factor=2.0, beta_fast=3.0),
            ["beta_fast, rope_type: found 3.0, which linear does not read; leave it out, or set rope_type to yarn"],
        ),
        (
            replace(YARN, rope_type=RopeType.LLAMA3, low_freq_factor=4.0),
            ["low_freq_factor, high_freq_factor: found 4.0, expected less than high_freq_factor"],
        ),
        (replace(YARN, beta_slow=32.0), ["beta_slow, beta_fast: found 32.0, expected less than beta_fast"]),
        (YARN, []),
    ],
    ids=["linear", "yarn", "default", "another-kind's", "llama3-order", "yarn-order", "good"],
)
def test_a_section_that_means_nothing_is_refused(scaling: RopeScalingConfig, words: list[str]) -> None:
    found = [", ".join(path.rpartition(".")[2] for path in p.paths) + f": {p.text}" for p in rope_problems(scaling)]
    assert len(found) == len(words)
    assert all(line.startswith(start) for line, start in zip(found, words, strict=True)), found
