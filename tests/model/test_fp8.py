"""FP8: what Megatron is told, and that a machine without it says so before anything is built. No GPU is asked here."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from megatron.core.enums import Fp8Recipe

from megatron_deepstack.config.choices import Fp8Scaling, Layers, Precision
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, ParallelConfig, Recipe, TrainConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers import fp8
from megatron_deepstack.model.layers.fp8 import require_fp8
from megatron_deepstack.model.layers.megatron_config import decoder_config, vision_config
from megatron_deepstack.planning.batch.sequence import padded_length
from megatron_deepstack.planning.check import check_plan
from megatron_deepstack.platform.compute.transformer_engine import unavailable

FORMATS = {
    Fp8Scaling.TENSORWISE: "hybrid",
    Fp8Scaling.DELAYED: "hybrid",
    Fp8Scaling.BLOCKWISE: "e4m3",
    Fp8Scaling.MXFP8: "e4m3",
}


@pytest.mark.parametrize("scaling", list(Fp8Scaling))
def test_megatron_is_told_format_and_recipe(scaling: Fp8Scaling) -> None:
    config = decoder_config(LanguageConfig(), ParallelConfig(), Precision.FP8, scaling)
    assert (config.fp8, config.fp8_recipe) == (FORMATS[scaling], Fp8Recipe(scaling.value))
    assert config.bf16
    assert config.params_dtype is torch.bfloat16
    assert not config.fp8_param
    assert config.fp8_amax_history_len == (1024 if scaling is Fp8Scaling.DELAYED else 1)


def test_other_precisions_and_the_vit_have_none_of_it() -> None:
    for precision in (Precision.BF16, Precision.FP32):
        assert decoder_config(LanguageConfig(), ParallelConfig(), precision, Fp8Scaling.MXFP8).fp8 is None
    vit = vision_config(ModelConfig().vision, Precision.FP8)
    assert vit.fp8 is None
    assert vit.bf16


NOT_INSTALLED = "the package transformer_engine is not installed (pip install 'megatron-deepstack[gpu]')"


def on(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], *, engine: bool) -> None:
    """A machine with such a GPU, with or without Transformer Engine."""
    monkeypatch.setattr(fp8, "device_name", lambda: name)
    monkeypatch.setattr(fp8, "compute_capability", lambda: capability)
    monkeypatch.setattr(fp8, "engine_problem", lambda: None if engine else NOT_INSTALLED)
    monkeypatch.setattr(fp8, "unavailable", lambda question: None)


REFUSED = [
    ("cpu", (0, 0), False, Fp8Scaling.TENSORWISE, [r"Ada \(L4, L40S\) or later .* found no GPU", "transformer_engine"]),
    (
        "NVIDIA H100",
        (9, 0),
        False,
        Fp8Scaling.TENSORWISE,
        [r"the package transformer_engine is not installed \(pip install"],
    ),
    ("NVIDIA A100", (8, 0), True, Fp8Scaling.DELAYED, ["found NVIDIA A100 of compute capability 8.0"]),
    ("NVIDIA L4", (8, 9), True, Fp8Scaling.BLOCKWISE, [r"Hopper \(H100, H200\) or later for fp8_scaling blockwise"]),
    ("NVIDIA H100", (9, 0), True, Fp8Scaling.MXFP8, [r"Blackwell \(B200\) or later for fp8_scaling mxfp8"]),
]


@pytest.mark.parametrize(
    ("name", "capability", "engine", "scaling", "problems"),
    REFUSED,
    ids=["no GPU", "no engine", "too old", "blockwise on Ada", "mxfp8 on Hopper"],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    engine: bool,
    scaling: Fp8Scaling,
    problems: list[str],
) -> None:
    on(monkeypatch, name, capability, engine=engine)
    with pytest.raises(ConfigError) as caught:
        require_fp8(Precision.FP8, scaling, Layers.AUTO)
    assert len(caught.value.problems) == len(problems)
    for problem in problems:
        assert caught.match(problem)
    require_fp8(Precision.BF16, scaling, Layers.AUTO)


def test_machines_that_have_it_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA H100", (9, 0), engine=True)
    for scaling in (Fp8Scaling.TENSORWISE, Fp8Scaling.DELAYED, Fp8Scaling.BLOCKWISE):
        require_fp8(Precision.FP8, scaling, Layers.AUTO)
    with pytest.raises(ConfigError, match=r"model\.layers is `local`"):
        require_fp8(Precision.FP8, Fp8Scaling.TENSORWISE, Layers.LOCAL)


@pytest.mark.parametrize(
    ("scaling", "capability", "question"),
    [
        (Fp8Scaling.TENSORWISE, (9, 0), "is_fp8_available"),
        (Fp8Scaling.DELAYED, (8, 9), "is_fp8_available"),
        (Fp8Scaling.BLOCKWISE, (9, 0), "is_fp8_block_scaling_available"),
        (Fp8Scaling.MXFP8, (12, 0), "is_mxfp8_available"),
    ],
)
def test_the_engine_itself_is_asked(
    monkeypatch: pytest.MonkeyPatch, scaling: Fp8Scaling, capability: tuple[int, int], question: str
) -> None:
    """Its reason is named: an old CUDA, or a GPU newer than it knows."""
    on(monkeypatch, "a GPU", capability, engine=True)
    monkeypatch.setattr(fp8, "unavailable", lambda asked: "CUDA >= 12.9 is required" if asked == question else None)
    with pytest.raises(ConfigError, match=f"fp8_scaling {scaling} .* says: CUDA >= 12.9 is required; choose another"):
        require_fp8(Precision.FP8, scaling, Layers.AUTO)


@pytest.mark.parametrize(("answer", "expected"), [((True, ""), None), ((False, "Too old."), "Too old")])
def test_its_answer_is_read(monkeypatch: pytest.MonkeyPatch, answer: tuple[bool, str], expected: str | None) -> None:
    engine = ModuleType("transformer_engine.pytorch")
    engine.is_fp8_available = lambda return_reason: answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    assert unavailable("is_fp8_available") == expected
    assert unavailable("is_not_known_to_this_version") is None


def recipe(**train: object) -> Recipe:
    return Recipe(train=TrainConfig(precision=Precision.FP8, **train))  # type: ignore[arg-type]


def test_recipes_that_no_machine_could_run_are_refused_by_plan() -> None:
    check_plan(recipe())
    with pytest.raises(ConfigError, match=r"`local` layers have none of it; set model\.layers=auto"):
        check_plan(replace(recipe(), model=ModelConfig(layers=Layers.LOCAL)))
    narrow = ModelConfig(language=LanguageConfig(ffn_hidden_size=11000))
    with pytest.raises(ConfigError, match="the decoder's mlp_out is 2750 x 4096 on a rank"):
        check_plan(replace(recipe(), model=narrow, parallel=ParallelConfig(tensor=4)))
    with pytest.raises(ConfigError, match=r"2000 tokens are no multiple of 64 .* use 1984"):
        check_plan(replace(recipe(seq_length=2000), parallel=ParallelConfig(context=2)))


def test_sequences_are_padded_to_what_products_take() -> None:
    layout = ParallelConfig(context=2, tensor=2, sequence_parallel=True)
    assert padded_length([65], layout, Precision.BF16) == 72
    assert padded_length([65], layout, Precision.FP8) == 128
    assert padded_length([65], ParallelConfig(), Precision.FP8) == 96
    assert padded_length([65], ParallelConfig()) == 65
