"""FLOPs of a step: against what torch counts in the plain model, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_deepstack.config.choices import LoraTarget, Part, Variant
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.model.init import random_source
from megatron_deepstack.planning.batch.packing import merge
from megatron_deepstack.planning.batch.step_plan import plan_step
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.cost import (
    decoder_flops,
    projector_flops,
    stage_weights,
    training_flops,
    view_flops,
)
from megatron_deepstack.planning.exchange.rows import tokens_per_view
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.testing.oracle import language, vision
from megatron_deepstack.testing.tiny import tiny_granite, tiny_model, tiny_qwen3_vl, tiny_samples

NO_LORA = LoraConfig()
GROUPED = LanguageConfig(
    vocab_size=61, hidden_size=32, ffn_hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12
)


class Weights(dict[str, torch.Tensor]):
    """Weights of whatever the oracle asks for, all of them wanting gradients or none."""

    def __init__(self, model: ModelConfig, shapes: dict[str, tuple[int, ...]], learned: bool) -> None:
        source = random_source(model, 0)
        super().__init__({name: source(name, shape).requires_grad_(learned) for name, shape in shapes.items()})


def decoder_shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    h, f, d = config.hidden_size, config.ffn_hidden_size, config.head_dim or config.hidden_size // config.num_heads
    q, kv = config.num_heads * d, (config.num_kv_heads or config.num_heads) * d
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (h,), "lm_head.weight": (config.vocab_size, h)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{x}_proj.weight": (q if x == "q" else kv, h) for x in "qkv"}
        shapes |= {f"{prefix}self_attn.o_proj.weight": (h, q), f"{prefix}mlp.down_proj.weight": (h, f)}
        shapes |= {f"{prefix}mlp.{x}_proj.weight": (f, h) for x in ("gate", "up")}
    return shapes


def above_the_diagonal(config: LanguageConfig, length: int) -> float:
    """What the oracle computes of attention's forward and a causal kernel need not: half of it, in every layer."""
    width = config.num_heads * (config.head_dim or config.hidden_size // config.num_heads)
    return 2 * length * length * width * config.num_layers


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
@pytest.mark.parametrize("config", [tiny_model().language, GROUPED], ids=["heads", "grouped"])
def test_decoder_costs_what_torch_counts(config: LanguageConfig, learned: bool) -> None:
    """Forward, and forward with backward where the decoder learns or lets gradients through to the rows."""
    length = 24
    model = tiny_model(language=config, stacks=StackConfig(slots=(0, 1, 2, 2)))
    weights = Weights(model, decoder_shapes(config), learned)
    hidden = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        logits = language.decode(config, weights, hidden, {})
    assert decoder_flops(config, length) == counter.get_total_flops() - above_the_diagonal(config, length)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    total = counter.get_total_flops() + backward.get_total_flops() - 3 * above_the_diagonal(config, length)
    trainable = (Part.PROJECTOR, Part.LANGUAGE) if learned else (Part.PROJECTOR,)
    assert training_flops(model, trainable, NO_LORA, [length], 0) == total


SIGLIP = VisionConfig(
    image_size=16, patch_size=4, hidden_size=24, ffn_hidden_size=48, num_layers=3, num_heads=2, kind="siglip"
)


@pytest.mark.parametrize(
    "trainable",
    [(Part.VISION, Part.PROJECTOR), (Part.PROJECTOR,), (Part.VISION,), (Part.LANGUAGE,)],
    ids=["both", "projector", "vision", "neither"],
)
def test_encoder_costs_what_torch_counts(trainable: tuple[Part, ...]) -> None:
    """Views through ViT and projector, either of them learned or frozen."""
    model, num_views = tiny_model(), 5
    drawn = encoder_weights(model, trainable)
    pixels = torch.randn(num_views, 3, model.vision.image_size, model.vision.image_size)
    with FlopCounterMode(display=False) as forward:
        rows = vision.project(drawn, vision.encode_views(model.vision, drawn, pixels))
    assert forward.get_total_flops() == num_views * (view_flops(model.vision) + projector_flops(model))
    total = forward.get_total_flops()
    if rows.requires_grad:
        with FlopCounterMode(display=False) as backward:
            rows.sum().backward()
        total += backward.get_total_flops()
    assert training_flops(model, trainable, NO_LORA, [], num_views) == total


def encoder_weights(model: ModelConfig, trainable: tuple[Part, ...]) -> dict[str, torch.Tensor]:
    config, hidden = model.vision, model.language.hidden_size
    c, f, p = config.hidden_size, config.ffn_hidden_size, config.patch_size
    tower = "model.vision_tower.vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (c, 3, p, p),
        f"{tower}embeddings.class_embedding": (c,),
        f"{tower}embeddings.position_embedding.weight": (tokens_per_view(config) + 1, c),
        f"{tower}pre_layrnorm.weight": (c,),
        f"{tower}pre_layrnorm.bias": (c,),
        "model.mm_projector.0.weight": (hidden, c),
        "model.mm_projector.0.bias": (hidden,),
        "model.mm_projector.2.weight": (hidden, hidden),
        "model.mm_projector.2.bias": (hidden,),
    }
    for layer in range(config.num_layers):
        prefix = f"{tower}encoder.layers.{layer}."
        sizes = {f"self_attn.{x}_proj": (c, c) for x in ("q", "k", "v", "out")} | {"mlp.fc1": (f, c), "mlp.fc2": (c, f)}
        for name, (rows, columns) in sizes.items():
            shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
        shapes |= {f"{prefix}layer_norm{n}.{kind}": (c,) for n in (1, 2) for kind in ("weight", "bias")}
    learned = {True: Part.VISION in trainable, False: Part.PROJECTOR in trainable}
    source = random_source(model, 0)
    return {name: source(name, shape).requires_grad_(learned[name.startswith(tower)]) for name, shape in shapes.items()}


SEVEN_B = ModelConfig(vision=VisionConfig(), language=LanguageConfig())


def test_published_size_by_hand() -> None:
    """Vicuna-7B at 1024 tokens and CLIP ViT-L/14-336's 23 used layers at 577, from their widths."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert 32 * layer + 4096 * 32000 == 6_607_077_376  # the parameters that multiply: 6.74e9 less the embedding's 1.3e8
    attention = 32 * 2 * 1024**2 * 4096
    assert decoder_flops(SEVEN_B.language, 1024) == 2 * 1024 * 6_607_077_376 + attention
    vit_layer = 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024
    assert view_flops(SEVEN_B.vision) == 23 * vit_layer + 2 * 576 * 3 * 14**2 * 1024
    assert projector_flops(SEVEN_B) == 2 * 576 * (1024 * 4096 + 4096 * 4096)


def test_stages_by_hand() -> None:
    """The projector's stage pays the decoder's gradients' way, not the decoder's own; the ViT counts once."""
    decoder, vit, projector = (
        decoder_flops(SEVEN_B.language, 1024),
        view_flops(SEVEN_B.vision),
        projector_flops(SEVEN_B),
    )
    attention = 32 * 2 * 1024**2 * 4096
    first = 2 * 576 * 1024 * 4096
    pretrain = training_flops(SEVEN_B, (Part.PROJECTOR,), NO_LORA, [1024] * 2, 10)
    assert pretrain == 2 * (2 * (decoder - attention) + 3 * attention) + 10 * (vit + 3 * projector - first)
    finetune = training_flops(SEVEN_B, (Part.PROJECTOR, Part.LANGUAGE), NO_LORA, [1024] * 2, 10)
    assert finetune == 2 * 3 * decoder + 10 * (vit + 3 * projector - first)
    everything = training_flops(SEVEN_B, tuple(Part), NO_LORA, [1024], 1)
    patches = 2 * 576 * 3 * 14**2 * 1024
    assert everything == 3 * decoder + 3 * vit - patches + 3 * projector  # pixels want no gradient


def test_stacks_in_the_vit_share_its_first_layers() -> None:
    """DeepStack-V: five views through 20 layers, the global view alone through three more."""
    model = replace(SEVEN_B, variant=Variant.DEEPSTACK_V, stacks=StackConfig(start=20))
    layer = 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024
    patches = 2 * 576 * 3 * 14**2 * 1024
    projector = projector_flops(model)
    assert training_flops(model, (Part.LANGUAGE,), NO_LORA, [], 1) == (5 * 20 + 3) * layer + 5 * patches + projector


def test_adapters_cost_their_own_matrices_and_spare_the_base() -> None:
    lora = LoraConfig(rank=16, targets=(LoraTarget.QKV, LoraTarget.MLP_OUT))
    length, trainable = 512, (Part.LANGUAGE,)
    attention = 32 * 2 * length**2 * 4096
    matrices = decoder_flops(SEVEN_B.language, length) - attention
    adapters = 2 * length * 32 * 16 * ((4096 + 3 * 4096) + (11008 + 4096))
    assert training_flops(SEVEN_B, trainable, lora, [length], 0) == 2 * matrices + 3 * attention + 3 * adapters


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2, pipeline=2)], ids=["one", "tp2-pp2"])
def test_packing_and_layout_do_not_change_the_work(parallel: ParallelConfig) -> None:
    """The plan counts samples at their own length and views once, however they are packed, padded or dealt."""
    model = tiny_model()
    samples = [sample.planned(model, 256) for sample in tiny_samples(model, 6)]
    padded = plan_step(model, parallel, [samples[:3], samples[3:]], 0)
    packed = plan_step(model, parallel, [[merge(samples)]], 0, packed=True)
    assert padded.lengths == packed.lengths == tuple(sample.sequence.length for sample in samples)
    views = sum(1 + columns * rows for sample in samples for columns, rows in sample.grids)
    assert padded.num_units == packed.num_units == views
    images = sum(int(np.sum(sample.tokens == IMAGE_TOKEN_ID)) for sample in tiny_samples(model, 6))
    assert sum(padded.lengths) == sum(len(s.tokens) for s in tiny_samples(model, 6)) + images * (16 - 1)


def test_stage_weights_add_up_to_the_decoders_matrices() -> None:
    """Whatever the split; the output layer lies on the last stage, interleaved chunks on the stage they live on."""
    matrices = sum(int(np.prod(shape)) for shape in decoder_shapes(GROUPED).values() if len(shape) == 2)
    head = GROUPED.vocab_size * GROUPED.hidden_size
    layer = (matrices - head) // GROUPED.num_layers
    assert stage_weights(GROUPED, ParallelConfig()) == (matrices,)
    uneven = ParallelConfig(pipeline=3, layers_per_stage=(0, 2, 1))
    assert stage_weights(GROUPED, uneven) == (0, 2 * layer, layer + head)
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2, layers_per_stage=(1, 0, 1, 1))
    assert stage_weights(GROUPED, interleaved) == (2 * layer, layer + head)


def test_adapters_of_tower_and_projector_spare_the_base() -> None:
    """A frozen matrix has no gradient of its own; gradients pass through it, and each adapter costs three forwards."""
    lora = LoraConfig(rank=8, targets=(), vision_targets=(LoraTarget.QKV, LoraTarget.MLP_IN), projector=True)
    linears, attention = 23 * 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096), 23 * 4 * 577**2 * 1024
    patches, projector = 2 * 576 * 3 * 14**2 * 1024, projector_flops(SEVEN_B)
    of_tower = 23 * 2 * 577 * 8 * ((1024 + 3 * 1024) + (1024 + 4096))
    of_projector = 2 * 576 * 8 * ((1024 + 4096) + (4096 + 4096))
    both = training_flops(SEVEN_B, (Part.VISION, Part.PROJECTOR), lora, [], 1)
    assert both == 2 * linears + 3 * attention + patches + 3 * of_tower + 2 * projector + 3 * of_projector
    first = 2 * 576 * 1024 * 4096  # nothing before it learns
    alone = training_flops(SEVEN_B, (Part.PROJECTOR,), replace(lora, vision_targets=()), [], 1)
    assert alone == linears + attention + patches + 2 * projector - first + 3 * of_projector


@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision"])
def test_adapters_of_other_forms_spare_the_base(name: str) -> None:
    """Mergers and Q-Formers: less than learning whole, more than frozen, and by rank."""
    model = tiny_qwen3_vl() if name == "qwen3_vl" else tiny_granite()
    grids = [ViewGrid(frames=1, height=4, width=4)] * 2 if name == "qwen3_vl" else []
    parts = (Part.VISION, Part.PROJECTOR)
    frozen, whole = (training_flops(model, trainable, NO_LORA, [], 2, grids) for trainable in ((), parts))
    adapted = [
        training_flops(
            model, parts, LoraConfig(rank=rank, vision_targets=tuple(LoraTarget), projector=True), [], 2, grids
        )
        for rank in (1, 2, 3)
    ]
    assert frozen < adapted[0] < whole
    assert adapted[1] - adapted[0] == adapted[2] - adapted[1] > 0
