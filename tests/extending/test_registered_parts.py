"""A tower and a family added from outside go through everything: recipe, plan, cost, ranks, conversion both ways."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import new_parts
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

from megatron_deepstack.config.choices import Activation, Part, Precision, Variant
from megatron_deepstack.config.load import load_recipe, recipe_to_yaml
from megatron_deepstack.config.schema import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.config.traits.families import FamilyTraits, register_family
from megatron_deepstack.config.traits.installed import GROUP, load_installed_parts
from megatron_deepstack.config.traits.towers import register_tower, tower_of
from megatron_deepstack.convert.export import export_model
from megatron_deepstack.convert.hf_names import Naming, by_published_name, leading_ones
from megatron_deepstack.convert.published import published_source
from megatron_deepstack.convert.tensor_files import files_by_name, read_tensor
from megatron_deepstack.errors import CheckpointError, ConfigError
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_deepstack.planning.budget.cost import training_flops, view_flops
from megatron_deepstack.planning.budget.parameters import model_parameters
from megatron_deepstack.planning.check import check_plan
from megatron_deepstack.testing.oracle import OracleSample, oracle_forward
from megatron_deepstack.testing.published.reference import check_case
from megatron_deepstack.testing.published.reference_case import ReferenceCase
from megatron_deepstack.testing.ranks import RankPool, groups_for

pytestmark = pytest.mark.usefixtures("quiet_transformers", "registered")

Pools = Callable[[int], RankPool]
VISION = VisionConfig(
    kind="vit",
    image_size=16,
    patch_size=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_layers=3,
    num_heads=2,
    activation=Activation.GELU,
    layernorm_epsilon=1e-12,
)
LANGUAGE = LanguageConfig(
    family="biased_llama",
    vocab_size=61,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
)
MODEL = ModelConfig(variant=Variant.LLAVA, vision=VISION, language=LANGUAGE)
RECIPE = """
model:
  vision: {kind: vit, activation: gelu}
  language: {family: biased_llama, qkv_bias: true}
"""


@pytest.fixture(scope="module")
def registered() -> None:
    new_parts.register()


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_recipe_names_them(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    assert (recipe.model.vision.kind, recipe.model.language.family) == ("vit", "biased_llama")
    check_plan(recipe)
    assert load_recipe(recipe_file(tmp_path, recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.vision.kind=vitt",
            "model.vision.kind: found 'vitt', expected one of clip, siglip, .*did you mean 'vit'",
        ),
        (
            "model.vision.activation=quick_gelu",
            "activation: found quick_gelu, expected one of gelu, which the tower vit",
        ),
        (
            "model.language.family=lama",
            "model.language.family: found 'lama', expected one of llama, .*did you mean 'll",
        ),
        ("model.language.qkv_bias=false", "biased_llama has qkv_bias: true, qk_norm: false; set these, or leave the f"),
    ],
)
def test_what_does_not_fit_them_is_said(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(tmp_path), [override])


def test_a_name_is_given_once() -> None:
    new_parts.register()
    with pytest.raises(ConfigError, match="'clip' is another tower's name already"):
        register_tower("clip", new_parts.VIT)
    with pytest.raises(ConfigError, match="'llama' is another family's name already"):
        register_family("llama", FamilyTraits())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with an entry point, as pip leaves one behind, whose module is still to be written."""
    about = tmp_path / "more_towers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-towers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nmore = more_towers:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_installed_parts.cache_clear()
    yield tmp_path
    load_installed_parts.cache_clear()
    sys.modules.pop("more_towers", None)


def test_an_installed_package_adds_its_own(installed: Path) -> None:
    """So that the command line, and ranks that it starts, know them without a program of one's own."""
    (installed / "more_towers.py").write_text(
        "from new_parts import VIT, register_tower\ndef register():\n    register_tower('installed_vit', VIT)\n"
    )
    recipe = load_recipe(recipe_file(installed, RECIPE.replace("kind: vit", "kind: installed_vit")))
    assert tower_of(recipe.model.vision) == new_parts.VIT


def test_an_installed_package_that_fails_is_named(installed: Path) -> None:
    (installed / "more_towers.py").write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=r"package more-towers .* more_towers:register .* No module named 'no_such"):
        load_recipe(recipe_file(installed, RECIPE.replace("kind: vit", "kind: another_vit")))


def test_a_row_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="family 'odd': has_linear_biases comes with biases on query, key and value"):
        register_family("odd", FamilyTraits(has_linear_biases=True))
    with pytest.raises(
        ConfigError, match=r"family 'odd': found switches \['bias'\], expected some of qkv_bias, qk_norm"
    ):
        register_family("odd", FamilyTraits(switches={"bias": True}))


def test_cost_and_footprint_follow_from_the_row() -> None:
    """The class token runs through the layers of a view; the parameters are transformers' own number of them."""
    siglip = replace(MODEL, vision=replace(VISION, kind="siglip"))
    assert view_flops(VISION) > view_flops(siglip.vision)
    assert training_flops(MODEL, tuple(Part), LoraConfig(), [64], 2) > training_flops(
        siglip, tuple(Part), LoraConfig(), [64], 2
    )
    tower = llava().model.vision_tower
    theirs = sum(p.numel() for name, p in tower.named_parameters() if not name.startswith(("pooler", "layernorm")))
    assert model_parameters(MODEL)[Part.VISION] == theirs


def llava() -> LlavaForConditionalGeneration:
    """transformers' model of the two, with weights that leave nothing at its default."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = LlavaConfig(
        vision_config=ViTConfig(hidden_size=24, intermediate_size=40, **sizes),
        text_config=LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            hidden_act="gelu_pytorch_tanh",
            attention_bias=True,
            mlp_bias=True,
        ),
        image_token_index=0,
    )
    module = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = "norm" in name.split(".")[-2] and name.endswith("weight")
            scale = 0.3 if is_norm or parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + float(is_norm))
    return module


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's tensors that are ours, by published name and in our shapes."""
    files = files_by_name(folder)
    names = by_published_name(files, str(folder), MODEL)
    found = {ours: read_tensor(files[theirs], theirs) for ours, theirs in names.items()}
    return {name: tensor.reshape(tensor.shape[leading_ones(name, MODEL) :]) for name, tensor in found.items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, registered: None) -> ReferenceCase:
    """Two samples, one of them with an image, through transformers in float64, gradients included."""
    folder = tmp_path_factory.mktemp("theirs")
    module = llava()
    module.save_pretrained(folder / "weights")
    generator = torch.Generator().manual_seed(1)
    samples, total, targets, logits = [], torch.zeros((), dtype=torch.float64), 0, []
    module = module.double()
    for with_image in (True, False):
        tokens = torch.randint(1, 61, (12,), generator=generator)
        labels = torch.where(torch.rand(12, generator=generator) < 0.5, tokens, IGNORE_INDEX)
        pixels = torch.randn(1, 3, 16, 16, generator=generator) if with_image else None
        opened, expanded = tokens, labels
        if with_image:
            tokens[4], labels[4] = IMAGE_TOKEN_ID, IGNORE_INDEX
            repeats = torch.where(tokens == IMAGE_TOKEN_ID, 16, 1)
            opened = tokens.masked_fill(tokens == IMAGE_TOKEN_ID, 0).repeat_interleave(repeats)
            expanded = labels.repeat_interleave(repeats)
        grids = ((1, 1),) if with_image else ()
        samples.append(OracleSample(tokens=tokens, labels=labels, pixel_values=pixels, grids=grids))
        out = module(input_ids=opened[None], pixel_values=None if pixels is None else pixels.double()).logits[0]
        total = total + F.cross_entropy(out[:-1], expanded[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        targets += int((expanded[1:] != IGNORE_INDEX).sum())
        logits.append(out.detach().float())
    loss = total / targets
    loss.backward()
    with torch.no_grad():
        trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        for parameter in module.parameters():
            parameter.copy_(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)
    assert trained
    module.float().save_pretrained(folder / "gradients")
    gradients = {name: value for name, value in tensors_of(folder / "gradients").items() if not value.isnan().any()}
    return ReferenceCase(
        name="vit and biased_llama",
        model=MODEL,
        weights=tensors_of(folder / "weights"),
        grads=gradients,
        samples=tuple(samples),
        logits=tuple(logits),
        loss=loss.item(),
        attention_mask=torch.empty(0),
        max_tokens=None,
    )


LAYOUTS = [
    ("one", ParallelConfig()),
    ("tp2-sequence-parallel", ParallelConfig(tensor=2, sequence_parallel=True)),
    ("pp2", ParallelConfig(pipeline=2)),
]


@pytest.mark.parametrize("parallel", [row[1] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_they_compute_what_transformers_computes(ranks: Pools, case: ReferenceCase, parallel: ParallelConfig) -> None:
    """Logits, loss and every gradient."""
    pool = ranks(parallel.tensor * parallel.pipeline)
    pool.run(new_parts.register)
    result = check_case(pool, case, parallel)
    assert result.passed, str(result)


def test_the_oracle_knows_them(case: ReferenceCase) -> None:
    """Measured: logits 2.1e-6 apart."""
    for ours, theirs in zip(oracle_forward(MODEL, case.weights, case.samples), case.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def export_on_rank(rank: int, weights: dict[str, torch.Tensor], output: str, naming: Naming) -> None:
    from megatron_deepstack.model.build import build_model, fill_model

    new_parts.register()
    groups = groups_for(ParallelConfig())
    built = build_model(MODEL, ParallelConfig(), Precision.FP32, groups)
    fill_model(built, lambda name, shape: weights[name], groups.decoder.tp)
    export_model(built, MODEL, Path(output), naming)


@pytest.mark.parametrize("naming", Naming)
def test_an_export_is_read_back(ranks: Pools, case: ReferenceCase, tmp_path: Path, naming: Naming) -> None:
    """Under both namings, by us and, under Hugging Face's, by transformers; another model's recipe is refused."""
    ranks(1).run(export_on_rank, case.weights, str(tmp_path / "out"), naming)
    read = published_source(tmp_path / "out", model=MODEL)
    for name, tensor in case.weights.items():
        if "post_layernorm" not in name and "pooler" not in name:  # no feature passes these
            padded = naming is Naming.HUGGING_FACE and len(tensor) == LANGUAGE.vocab_size  # by the image token
            shape = (64, *tensor.shape[1:]) if padded else tuple(tensor.shape)
            assert torch.equal(read(name, shape)[: len(tensor)], tensor), name
    with pytest.raises(CheckpointError, match=r"model.vision.kind: 'vit' in the checkpoint, 'clip' in the recipe"):
        published_source(tmp_path / "out", model=replace(MODEL, vision=replace(VISION, kind="clip")))
    with pytest.raises(CheckpointError, match="another model than the recipe"):
        published_source(tmp_path / "out", model=replace(MODEL, language=replace(LANGUAGE, family=None)))
    if naming is Naming.HUGGING_FACE:
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
            assert opened.get_slice("vision_tower.embeddings.cls_token").get_shape() == [1, 1, 24]
        theirs, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert all("pooler" in name for name in report["missing_keys"])  # a head that no feature passes
        assert not report["unexpected_keys"]
        for sample, expected in zip(case.samples, case.logits, strict=True):
            image = sample.tokens == IMAGE_TOKEN_ID
            tokens = sample.tokens.masked_fill(image, theirs.config.image_token_id)
            tokens = tokens.repeat_interleave(torch.where(image, 16, 1))
            with torch.no_grad():
                logits = theirs(input_ids=tokens[None], pixel_values=sample.pixel_values).logits[0, :, :61]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)  # measured: 2.0e-6


def test_stacks_go_in_front_of_the_new_decoder(ranks: Pools, case: ReferenceCase) -> None:
    """Nothing of DeepStack asks which tower or family it has: four crops, stacks before layers 0 to 3."""
    model = replace(MODEL, variant=Variant.DEEPSTACK_L, stacks=StackConfig(start=0))
    pool = ranks(1)
    pool.run(new_parts.register)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 61, (9,), generator=generator)
    labels = tokens.clone()
    tokens[2], labels[2] = IMAGE_TOKEN_ID, IGNORE_INDEX
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    sample = OracleSample(tokens=tokens, labels=labels, pixel_values=pixels, grids=((2, 2),))
    weights = {name: tensor.clone().requires_grad_() for name, tensor in case.weights.items()}
    (logits,) = oracle_forward(model, weights, [sample])
    targets = torch.cat([labels[:2], labels.new_full((16,), IGNORE_INDEX), labels[3:]])[1:]
    loss = F.cross_entropy(logits[:-1], targets, ignore_index=IGNORE_INDEX)
    loss.backward()
    stacked = replace(
        case,
        model=model,
        samples=(sample,),
        logits=(logits.detach(),),
        loss=loss.item(),
        grads={name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None},
    )
    result = check_case(pool, stacked, ParallelConfig())
    assert result.passed, str(result)
