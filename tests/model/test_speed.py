"""Fusions and overlaps: what is decided from a recipe and a machine, and that fused results are the unfused ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings import rope_utils

from megatron_deepstack.config.choices import (
    Activation,
    GradientDtype,
    Layers,
    OptIn,
    Precision,
    Switch,
)
from megatron_deepstack.config.schema import LanguageConfig, LoraConfig, ParallelConfig, Recipe, SpeedConfig
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.model.layers.activation import ACTIVATIONS, activate, identity
from megatron_deepstack.model.layers.megatron_config import (
    decoder_config,
    vision_config,
    without_gradient_accumulation,
)
from megatron_deepstack.model.layers.speed import PLAIN, Speed, decide_speed, speed_of
from megatron_deepstack.platform.compute import capabilities as machine_facts
from megatron_deepstack.platform.compute.capabilities import Capabilities
from megatron_deepstack.testing.tiny import tiny_recipe

H100 = Capabilities(gpu=True, engine_problem=None, apex_gradients=False, compiler_problem=None)
BARE_GPU = Capabilities(gpu=True, engine_problem="no engine", apex_gradients=False, compiler_problem="no compiler")
CPU = Capabilities(gpu=False, engine_problem="no engine", apex_gradients=False, compiler_problem=None)
LAYOUT = ParallelConfig(pipeline=2, virtual_pipeline=2, distributed_optimizer=True)


def decided(
    machine: Capabilities,
    parallel: ParallelConfig = LAYOUT,
    *,
    precision: Precision = Precision.BF16,
    layers: Layers = Layers.AUTO,
    lora: int = 0,
    **speed: object,
) -> Speed:
    return decide_speed(
        SpeedConfig(**speed),  # type: ignore[arg-type]
        machine,
        language=LanguageConfig(),
        parallel=parallel,
        precision=precision,
        layers=layers,
        lora=LoraConfig(rank=lora),
    )


def names_of(speed: Speed) -> set[str]:
    return {name for name, value in asdict(speed).items() if value is True}


ALL = {field.name for field in fields(Speed)} - {"synchronize_p2p", "gradient_dtype", "cuda_graphs", "tp_overlap"}
FUSIONS = {name for name in ALL if name.endswith("fusion")}
DECISIONS = {
    "h100": (decided(H100), ALL),
    "h100-fp32": (decided(H100, precision=Precision.FP32), ALL - {"cross_entropy_fusion"}),
    "h100-lora": (decided(H100, lora=8), ALL - {"gradient_accumulation_fusion"}),
    "h100-one-chunk": (decided(H100, replace(LAYOUT, virtual_pipeline=1)), ALL - {"overlap_p2p"}),
    "h100-copies": (decided(H100, replace(LAYOUT, distributed_optimizer=False)), ALL - {"overlap_param_gather"}),
    "h100-no-overlap": (decided(H100, replace(LAYOUT, overlap_grad_reduce=False)), ALL - {"overlap_param_gather"}),
    "h100-local": (
        decided(H100, layers=Layers.LOCAL),
        ALL - {"rope_fusion", "gradient_accumulation_fusion", "vision_engine"},
    ),
    "h100-local-decoder": (
        decided(H100, layers=Layers.LOCAL, vision_layers=Layers.TRANSFORMER_ENGINE),
        ALL - {"rope_fusion", "gradient_accumulation_fusion"},
    ),
    "h100-apex": (
        decided(replace(H100, apex_gradients=True), layers=Layers.LOCAL),
        ALL - {"rope_fusion", "vision_engine"},
    ),
    "h100-never": (decided(H100, fusions=Switch.NEVER), ALL - FUSIONS),
    "h100-one-of-them": (
        decided(H100, fusions=Switch.NEVER, rope_fusion=Switch.ALWAYS),
        (ALL - FUSIONS) | {"rope_fusion"},
    ),
    "bare-gpu": (decided(BARE_GPU), {"optimizer_fusion", "overlap_p2p", "overlap_param_gather"}),
    "cpu": (decided(CPU), {"optimizer_fusion"}),
    "cpu-demanded": (
        decided(CPU, activation_fusion=Switch.ALWAYS, overlap_p2p=Switch.ALWAYS),
        {"optimizer_fusion", "activation_fusion", "overlap_p2p"},
    ),
}


@pytest.mark.parametrize(("speed", "names"), DECISIONS.values(), ids=DECISIONS)
def test_what_is_switched_on(speed: Speed, names: set[str]) -> None:
    assert names_of(speed) == names
    assert not speed.synchronize_p2p
    assert speed.gradient_dtype is torch.float32


IMPOSSIBLE = {
    "rope on a CPU": ({}, {"rope_fusion": Switch.ALWAYS}, "speed.rope_fusion: always is impossible here: this process"),
    "rope of local layers": (
        {"machine": H100, "layers": Layers.LOCAL},
        {"rope_fusion": Switch.ALWAYS},
        "speed.rope_fusion: always is impossible here: the layers are Megatron's local ones; use auto",
    ),
    "gradients without a kernel": (
        {"machine": BARE_GPU},
        {"gradient_accumulation_fusion": Switch.ALWAYS},
        "speed.gradient_accumulation_fusion: always is impossible here: no engine; Apex's kernel is not installed",
    ),
    "no compiler": (
        {"machine": BARE_GPU},
        {"activation_fusion": Switch.ALWAYS},
        "speed.activation_fusion: always is impossible here: no compiler; use auto",
    ),
    "the tower's engine": (
        {"machine": BARE_GPU},
        {"vision_layers": Layers.TRANSFORMER_ENGINE},
        "speed.vision_layers: transformer_engine is impossible here: no engine; use auto",
    ),
    "graphs without an engine": (
        {"machine": BARE_GPU},
        {"cuda_graphs": OptIn.ALWAYS},
        "speed.cuda_graphs: always is impossible here: no engine; use never",
    ),
    "overlap on a CPU": (
        {},
        {"tp_overlap": OptIn.ALWAYS},
        "speed.tp_overlap: always is impossible here: this process sees no GPU; use never",
    ),
    "Apex's kernel and activations on the host": (
        {"machine": replace(BARE_GPU, apex_gradients=True), "parallel": ParallelConfig(offload_layers=2)},
        {"gradient_accumulation_fusion": Switch.ALWAYS},
        "speed.gradient_accumulation_fusion: always is impossible here: no engine; Megatron's own linears mark their",
    ),
    "one chunk": (
        {"machine": H100, "parallel": ParallelConfig(pipeline=2)},
        {"overlap_p2p": Switch.ALWAYS},
        "speed.overlap_p2p: always is impossible here: a stage has one chunk",
    ),
}


@pytest.mark.parametrize(("where", "speed", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_is_demanded_and_impossible_is_named(
    where: dict[str, object], speed: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        decided(**{"machine": CPU, **where, **speed})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_all_fusions_can_be_demanded_at_once() -> None:
    """Each that is impossible is named, with its reason."""
    with pytest.raises(ConfigError) as caught:
        decided(CPU, precision=Precision.FP32, lora=4, fusions=Switch.ALWAYS)
    problems = [problem.split(":")[0] for problem in caught.value.problems]
    assert problems == ["speed.rope_fusion", "speed.gradient_accumulation_fusion", "speed.cross_entropy_fusion"]


@pytest.fixture
def engine_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron looks for Transformer Engine's rotary kernels when a config asks for them."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", identity)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", identity)


@pytest.mark.usefixtures("engine_kernels")
def test_megatron_is_told_all_of_it() -> None:
    """On an H100: the decoder's config; the copy of its output layer; the tower's, which accumulates nothing."""
    recipe = replace(Recipe(), parallel=LAYOUT)
    speed = speed_of(recipe, H100)
    config = decoder_config(recipe.model.language, LAYOUT, Precision.BF16, speed=speed)
    assert config.bias_activation_fusion
    assert config.apply_rope_fusion
    assert config.gradient_accumulation_fusion
    assert (config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl) == (True, "native")
    assert (config.overlap_p2p_comm, config.batch_p2p_comm, config.batch_p2p_sync) == (True, False, False)
    head = without_gradient_accumulation(config)
    assert not head.gradient_accumulation_fusion
    assert config.gradient_accumulation_fusion, "the decoder's own config was changed"
    tower = vision_config(recipe.model.vision, Precision.BF16, speed)
    assert not tower.gradient_accumulation_fusion
    assert not tower.bias_activation_fusion
    assert tower.engine_layers
    assert tower.fused_activation is Activation.QUICK_GELU
    assert tower.activation_func is ACTIVATIONS[Activation.QUICK_GELU]
    assert tower.for_layers().activation_func is identity


def test_what_is_done_on_demand_alone() -> None:
    """Gathering beside computation gives way to graphs."""
    wanted = SpeedConfig(cuda_graphs=OptIn.ALWAYS, tp_overlap=OptIn.ALWAYS)
    layout = ParallelConfig(tensor=2, sequence_parallel=True, distributed_optimizer=True)
    speed = speed_of(replace(Recipe(), parallel=layout, speed=wanted), H100)
    assert (speed.cuda_graphs, speed.tp_overlap, speed.overlap_param_gather) == (True, True, False)
    assert speed_of(replace(Recipe(), parallel=layout), H100).overlap_param_gather
    told = replace(PLAIN, cuda_graphs=True, tp_overlap=True)
    config = decoder_config(Recipe().model.language, layout, Precision.BF16, speed=told)
    assert config.cuda_graph_impl == "transformer_engine"
    assert config.tp_comm_overlap


def test_plain_is_plain_megatron() -> None:
    config = decoder_config(Recipe().model.language, ParallelConfig(), Precision.BF16, speed=PLAIN)
    assert not config.bias_activation_fusion
    assert not config.cross_entropy_loss_fusion
    assert not config.overlap_p2p_comm
    assert config.cuda_graph_impl == "none"
    assert not config.tp_comm_overlap
    tower = vision_config(Recipe().model.vision, Precision.BF16)
    assert tower.for_layers() is tower


def test_a_gated_gelu_is_left_alone() -> None:
    """Megatron's fused GELU is the approximation with tanh."""
    speed = replace(PLAIN, activation_fusion=True)
    language = Recipe().model.language
    assert decoder_config(language, ParallelConfig(), Precision.BF16, speed=speed).bias_activation_fusion


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Fused functions run as they are written: compiling takes seconds, and is tried by a slow test."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("activation", list(Activation))
def test_fused_bias_and_activation(activation: Activation) -> None:
    """Values and gradients against autograd's. Measured: worst 3e-7 of the largest value, float32."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 3, 16, generator=generator), torch.randn(16, generator=generator)
    grad = torch.randn(5, 3, 16, generator=generator)
    results = []
    for compute in (lambda x, b: activate(x, b, activation), lambda x, b: ACTIVATIONS[activation](x + b)):
        own = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = compute(*own)
        out.backward(grad)
        results.append((out, *(one.grad for one in own)))
    for fused, unfused in zip(*results, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_activation_is_the_same() -> None:
    """With the compiler of this machine, at two lengths, in bf16. Measured: equal to the last bit."""
    for length in (7, 12):
        x, bias = torch.randn(length, 2, 32).bfloat16().requires_grad_(), torch.randn(32).bfloat16().requires_grad_()
        compiled = activate(x, bias, Activation.QUICK_GELU)
        (grad,) = torch.autograd.grad(compiled.float().sum(), x)
        with torch.compiler.set_stance("force_eager"):
            plain = activate(x, bias, Activation.QUICK_GELU)
            (plain_grad,) = torch.autograd.grad(plain.float().sum(), x)
        torch.testing.assert_close(compiled, plain, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(grad, plain_grad, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("uncompiled")
def test_megatrons_fused_swiglu() -> None:
    """What the decoder takes. Measured: worst 2e-7, float32."""
    x = torch.randn(4, 2, 24, requires_grad=True)
    gate, up = x.chunk(2, -1)
    (torch.nn.functional.silu(gate) * up).sum().backward()
    expected, x.grad = x.grad, None
    bias_swiglu_impl(x, None).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_what_a_compiler_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = machine_facts._compiler_problem
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(machine_facts.shutil, "which", lambda name: None)
    assert "no compiler is installed (one of cc, gcc, clang" in str(problem(True))
    assert "one of g++, c++, clang++" in str(problem(False))
    monkeypatch.setattr(machine_facts.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine_facts, "find_spec", lambda name: None)
    assert problem(True) == "the package triton is not installed"
    monkeypatch.setattr(machine_facts.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python's header files are not installed" in str(problem(False))
    (tmp_path / "Python.h").touch()
    assert problem(False) is None


def test_gradients_in_bf16_need_bf16_parameters() -> None:
    recipe = replace(tiny_recipe(), speed=SpeedConfig(gradient_dtype=GradientDtype.BF16))
    assert speed_of(recipe, CPU).gradient_dtype is torch.bfloat16
