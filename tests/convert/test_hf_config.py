"""Hugging Face configs: what is known to be computed is accepted, and everything else is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, CLIPVisionConfig, SiglipVisionConfig

from megatron_deepstack.config.architectures import VISION
from megatron_deepstack.config.choices import RopeType
from megatron_deepstack.config.rope_scaling import rope_problems
from megatron_deepstack.config.schema import LanguageConfig, ModelConfig, RopeScalingConfig, VisionConfig
from megatron_deepstack.config.traits.families import FAMILIES
from megatron_deepstack.config.traits.hf_fields import NO_INFLUENCE, REQUIRED_VALUES
from megatron_deepstack.config.traits.towers import TOWERS
from megatron_deepstack.convert.hf_config import require_same_model
from megatron_deepstack.convert.hf_rope import ROPE_KEYS, WINDOW_KEYS, rope_scaling
from megatron_deepstack.convert.hf_written import llava_config, published_config
from megatron_deepstack.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("quiet_transformers")

LANGUAGE = LanguageConfig(num_layers=8, num_heads=8, num_kv_heads=2, hidden_size=64, ffn_hidden_size=96)
MODEL = ModelConfig(language=LANGUAGE)
SEQ_LENGTH = 2048
COMPUTED = {"llama", "mistral", "qwen2", "qwen3"}
"""Decoders of transformers that compute what ours do, where their config says nothing else."""


SCALING = "model.language.rope_scaling"


def text(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """The config of MODEL's decoder."""
    base = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
        "sliding_window": None,
    }
    return {key: value for key, value in {**base, **changes}.items() if value != "absent"}


def decoder(model_type: str) -> ModelConfig:
    """MODEL with the switches of a family."""
    return replace(MODEL, language=replace(LANGUAGE, **FAMILIES[model_type].switches))


def refusal(config: dict[str, Any], model: ModelConfig = MODEL, seq_length: int | None = SEQ_LENGTH) -> str:
    with pytest.raises(CheckpointError) as caught:
        require_same_model(config, model, "there", seq_length)
    return str(caught.value)


# id, model type, what its config says besides
ACCEPTED = [
    ("llama", "llama", {}),
    ("llama-of-transformers-4", "llama", {"rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1}),
    ("llama-of-transformers-5", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
    ("keys-without-influence", "llama", {"use_cache": True, "torch_dtype": "float16", "_name_or_path": "x"}),
    ("null-means-nothing", "llama", {"quantization_config": None, "some_future_key": None}),
    ("mistral-without-window", "mistral", {}),
    ("mistral-window-as-long-as-the-run", "mistral", {"sliding_window": SEQ_LENGTH}),
    ("qwen2-window-switched-off", "qwen2", {"sliding_window": 32, "use_sliding_window": False}),
    ("qwen2-window-on-no-layer", "qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 8}),
    ("qwen2-published", "qwen2", {"use_mrope": False, "attention_dropout": 0.0, "max_window_layers": 21}),
    ("qwen3-all-layers-full", "qwen3", {"layer_types": ["full_attention"] * 8, "attention_bias": False}),
    ("llava-1.5", "llava_llama", {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}),
]


@pytest.mark.parametrize(("model_type", "more"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_what_is_computed_is_accepted(model_type: str, more: dict[str, Any]) -> None:
    family = "llama" if model_type.startswith("llava") else model_type
    require_same_model(text(model_type, **more), decoder(family), "there", SEQ_LENGTH)


SCALED = [
    (
        "vicuna-16k",
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 16384},
        {"rope_type": RopeType.LINEAR, "factor": 4.0},
    ),
    (
        "llama-3.1",
        {
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "max_position_embeddings": 131072,
        },
        {"rope_type": RopeType.LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    (
        "both-keys",
        {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 10000}},
        {"rope_type": RopeType.LINEAR, "factor": 2.0},
    ),
    (
        "yarn-by-lengths",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": None, "mscale": 1.0, "mscale_all_dim": 1.0},
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 16384,
        },
        {
            "rope_type": RopeType.YARN,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
]


@pytest.mark.parametrize(("says", "means"), [row[1:] for row in SCALED], ids=[row[0] for row in SCALED])
def test_scaled_positions_are_read(says: dict[str, Any], means: dict[str, Any]) -> None:
    """As transformers reads them, and refused by name for a recipe whose scaling differs in any field."""
    config = text(**says)
    language = replace(LANGUAGE, rope_scaling=RopeScalingConfig(**means))
    require_same_model(config, replace(MODEL, language=language), "there", SEQ_LENGTH)
    assert list(rope_problems(language.rope_scaling)) == []
    made = CONFIG_MAPPING["llama"](**config)
    made.standardize_rope_params()  # as it does before it makes frequencies
    theirs = made.rope_parameters
    assert {name: value for name, value in rope_scaling(config).items() if value != theirs.get(name)} in (
        {},
        {"factor": 4.0},  # transformers works it out when it makes the frequencies
    )
    found = refusal(config)
    for name in means:
        assert f"{SCALING}.{name}: " in found


# id, model type, what its config says besides, the beginning of the line that refuses it
REFUSED = [
    ("granite", "granite", {"embedding_multiplier": 12.0}, "model_type: found 'granite'"),
    ("smollm3", "smollm3", {}, "model_type: found 'smollm3'"),
    ("no-model-type", "absent", {}, "model_type: found None"),
    ("llama-attention-multiplier", "llama", {"attention_multiplier": 0.1}, "attention_multiplier: found 0.1, a key"),
    ("logits-scaling", "llama", {"logits_scaling": 8.0}, "logits_scaling: found 8.0, a key that is not known"),
    ("residual-multiplier", "llama", {"residual_multiplier": 0.2}, "residual_multiplier: found 0.2"),
    ("final-softcap", "llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0"),
    ("attention-softcap", "qwen2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
    ("no-rope-layers", "llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers: found [1, 1, 1, 0]"),
    ("experts", "qwen3", {"num_experts": 8}, "num_experts: found 8"),
    ("parallel-residual", "llama", {"use_parallel_residual": True}, "use_parallel_residual: found True"),
    ("quantised", "llama", {"quantization_config": {"bits": 4}}, "quantization_config: found {'bits': 4}, computed"),
    ("activation", "llama", {"hidden_act": "gelu"}, "model.language.activation: 'gelu' in the checkpoint, 'silu'"),
    ("attention-bias", "llama", {"attention_bias": True}, "attention_bias: found True, computed is False"),
    ("qwen3-attention-bias", "qwen3", {"attention_bias": True}, "attention_bias: found True, computed is False"),
    ("mlp-bias", "llama", {"mlp_bias": True}, "mlp_bias: found True, computed is False"),
    ("dropout", "llama", {"attention_dropout": 0.1}, "attention_dropout: found 0.1, computed is 0.0"),
    ("pretraining-tp", "llama", {"pretraining_tp": 2}, "pretraining_tp: found 2, computed is 1"),
    ("encoder-decoder", "llama", {"is_encoder_decoder": True}, "is_encoder_decoder: found True"),
    ("head-dim", "llama", {"head_dim": 16}, "model.language.head_dim: 16 in the checkpoint, 8 in the recipe"),
    ("head-dim-default", "qwen3", {"head_dim": "absent"}, "model.language.head_dim: 128 in the checkpoint"),
    ("kv-heads-default", "llama", {"num_key_value_heads": "absent"}, "model.language.num_kv_heads: 8"),
    ("kv-heads-of-mistral", "mistral", {"num_key_value_heads": "absent"}, "model.language.num_kv_heads: 8"),
    ("epsilon-default", "llama", {"rms_norm_eps": "absent"}, "model.language.norm_epsilon: 1e-06"),
    ("layers-default", "llama", {"num_hidden_layers": "absent"}, "model.language.num_layers: 32 in the checkpoint"),
    *(
        (
            f"rope-{kind}",
            "llama",
            {"rope_scaling": {"rope_type": kind, "factor": 2.0}},
            f"rope_scaling: found {{'rope_type': '{kind}', 'factor': 2.0}}; positions scaled as '{kind}'",
        )
        for kind in ("dynamic", "longrope", "proportional")
    ),
    ("rope-kind", "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, f"{SCALING}.rope_type: 'linear' in"),
    ("rope-factor", "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, f"{SCALING}.factor: 2.0 in the"),
    ("rope-of-new", "qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, f"{SCALING}.rope_type: 'yarn'"),
    ("rope-odd", "llama", {"rope_scaling": {"type": "linear", "base": 2}}, "rope_scaling.base: found 2, a key that"),
    (
        "rope-other-kind's",
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        "rope_scaling.beta_fast: found 3, a key that",
    ),
    ("rope-axes", "qwen2", {"rope_parameters": {"mrope_section": [1, 1, 2]}}, "rope_parameters.mrope_section: found"),
    ("rope-base", "llama", {"rope_theta": 5e5}, "model.language.rope_theta: 500000.0 in the checkpoint"),
    ("rope-two-bases", "llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "model.language.rope_th"),
    ("rope-by-layer", "llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: found"),
    ("rope-of-a-part", "llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, computed is 1.0"),
    ("rope-part", "llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_fa"),
    ("window", "mistral", {"sliding_window": 2047}, "sliding_window: found 2047, so that a token sees that many"),
    ("window-default", "mistral", {"sliding_window": "absent"}, "sliding_window: found 4096"),
    ("window-of-qwen2", "qwen2", {"sliding_window": 32, "use_sliding_window": True}, "sliding_window: found 32"),
    ("window-of-llama", "llama", {"sliding_window": 32}, "sliding_window: found 32"),
    (
        "window-of-listed-layers",
        "qwen3",
        {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window: found 32",
    ),
    ("chunked-attention", "llama", {"layer_types": ["chunked_attention"]}, "layer_types: found ['chunked_attention']"),
    ("projector", "llava_llama", {"mm_projector_type": "linear"}, "mm_projector_type: found 'linear', computed is"),
    ("feature", "llava_llama", {"mm_vision_select_layer": -1}, "model.vision.select_layer: -1 in the checkpoint"),
    ("unknown-to-llava", "llava_llama", {"mm_gate": 1}, "mm_gate: found 1, a key that is not known here"),
]


@pytest.mark.parametrize(("model_type", "more", "line"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_everything_else_is_refused_by_name(model_type: str, more: dict[str, Any], line: str) -> None:
    family = model_type if model_type in FAMILIES else "llama"
    # as long as mistral's default window is too short for the run
    message = refusal(text(model_type, **more), decoder(family), 8192 if "absent" in more.values() else SEQ_LENGTH)
    lines = [found.strip() for found in message.splitlines()[1:]]
    assert any(found.startswith(line) for found in lines), message


def test_a_window_is_refused_where_the_length_is_not_known() -> None:
    assert "computed is all of an unknown length" in refusal(text("mistral", sliding_window=4096), seq_length=None)


def test_switches_are_compared_with_the_family() -> None:
    message = refusal(text("qwen2"))
    assert "model.language.qkv_bias: True in the checkpoint, False in the recipe" in message
    assert "model.language.qk_norm: True in the checkpoint, False in the recipe" in refusal(text("qwen3"))


TOWER = {"num_attention_heads": 16, "num_hidden_layers": 24, "layer_norm_eps": 1e-5}
TOWER_CHANGES = [
    ("activation", {"hidden_act": "gelu"}, "model.vision.activation: 'gelu' in the checkpoint, 'quick_gelu'"),
    ("epsilon", {"layer_norm_eps": 1e-6}, "model.vision.layernorm_epsilon: 1e-06 in the checkpoint"),
    ("heads", {"num_attention_heads": 12}, "model.vision.num_heads: 12 in the checkpoint, 16 in the recipe"),
    ("dropout", {"attention_dropout": 0.1}, "attention_dropout: found 0.1, computed is 0.0"),
    ("channels", {"num_channels": 1}, "num_channels: found 1, computed is 3"),
    ("stride", {"stride": 7}, "stride: found 7, a key that is not known here"),
    ("interpolation", {"interpolate_pos_encoding": True}, "interpolate_pos_encoding: found True, a key"),
    ("another-kind", {"model_type": "siglip_vision_model"}, "model.vision.kind: 'siglip' in the checkpoint, 'clip'"),
    ("unknown-kind", {"model_type": "pixtral"}, "vision_config.model_type: found 'pixtral', and what such a model"),
]


@pytest.mark.parametrize(("change", "line"), [row[1:] for row in TOWER_CHANGES], ids=[row[0] for row in TOWER_CHANGES])
def test_towers_are_compared_too(change: dict[str, Any], line: str) -> None:
    """In each config that holds a tower."""
    good = {"model_type": "clip_vision_model", **TOWER}
    llava = {"model_type": "llava", "text_config": text()}
    for config in ({"model_type": "clip", "text_config": {}}, llava):
        require_same_model({**config, "vision_config": good}, MODEL, "there", SEQ_LENGTH)
        assert line in refusal({**config, "vision_config": {**good, **change}})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act: found 'relu', computed is 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias: found False, computed is True"),
        ({"vision_feature_layer": -1}, "model.vision.select_layer: -1 in the checkpoint (vision_feature_layer), -2"),
        ({"vision_feature_layer": [-2, -5]}, "model.vision.select_layer: [-2, -5] in the checkpoint"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: 'full', computed is 'default'"),
        ({"text_config": text("gemma2")}, "text_config.model_type: found 'gemma2'"),
        ({"text_config": text(model_type="absent", hidden_act="relu")}, "model.language.activation: 'relu'"),
        ({"spatial_merge_size": 2}, "spatial_merge_size: found 2, a key that is not known here"),
    ],
)
def test_what_llava_says_itself(change: dict[str, Any], line: str) -> None:
    config = {"model_type": "llava", "text_config": text(), "vision_config": TOWER}
    require_same_model(config, MODEL, "there", SEQ_LENGTH)
    assert line in refusal({**config, **change})


def looks_like_llama(config: dict[str, Any]) -> bool:
    return {"hidden_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps"} <= config.keys()


PARTS_OF_WHOLE_MODELS = {"qwen3_vl_text", "qwen3_vl_moe_text", "granite4_vision_text"}


def configs_of_transformers() -> Iterator[tuple[str, dict[str, Any]]]:
    for model_type in CONFIG_MAPPING:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # some need arguments or packages, and cannot stand in a config.json as they are
            continue
        yield model_type, config


def recipe_of(config: dict[str, Any]) -> ModelConfig:
    """The recipe that a config's numbers, taken at their word, would ask for."""
    heads = config["num_attention_heads"]
    language = LanguageConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        norm_epsilon=config["rms_norm_eps"],
        tied_embeddings=config["tie_word_embeddings"],
        **FAMILIES[config["model_type"]].switches,
    )
    return ModelConfig(language=language)


@pytest.mark.slow
def test_every_decoder_of_transformers_is_known_or_refused() -> None:
    """Around 800 kinds of config: those like LLaMA's are computed by us, or refused."""
    similar = 0
    for model_type, config in configs_of_transformers():
        if not looks_like_llama(config):
            continue
        similar += 1
        if config["model_type"] in PARTS_OF_WHOLE_MODELS:
            assert refusal(config), model_type  # they are read within the config of the whole model
        elif config["model_type"] in COMPUTED:
            require_same_model(config, recipe_of(config), model_type, seq_length=4096)
        else:
            assert f"model_type: found {config['model_type']!r}" in refusal(config), model_type
    assert similar > 60


@pytest.mark.parametrize("model_type", sorted(COMPUTED))
def test_every_key_of_a_computed_family_is_understood(model_type: str) -> None:
    """A release of transformers that adds a key, or changes a default, fails here and not in a run."""
    config = CONFIG_MAPPING[model_type]().to_dict()
    known = FAMILIES[model_type].hugging_face
    assert known is not None
    assert not config.keys() - known.fields.keys() - NO_INFLUENCE - REQUIRED_VALUES.keys() - ROPE_KEYS - WINDOW_KEYS
    heads = config["num_attention_heads"]
    derived = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
    for key, field in known.fields.items():
        if key in config and (field.reads is not None or field.fixed) and field.compared:
            assert config[key] == (derived[key] if field.default is None else field.default), key
    assert config.get("sliding_window") == known.default_window


@pytest.mark.parametrize(("kind", "config"), [("clip", CLIPVisionConfig), ("siglip", SiglipVisionConfig)])
def test_every_key_of_a_tower_is_understood(kind: str, config: Any) -> None:
    theirs, known = config().to_dict(), TOWERS[kind].hugging_face
    assert known is not None
    assert not theirs.keys() - known.fields.keys() - NO_INFLUENCE - REQUIRED_VALUES.keys()
    for key, field in known.fields.items():
        if key in theirs and (field.reads is not None or field.fixed) and field.compared:
            assert theirs[key] == field.default, key


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("switches", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"qkv_bias": True, "qk_norm": True}])
def test_an_export_is_read_back(kind: str, switches: dict[str, bool]) -> None:
    """Both configs that we write describe the recipe that they were written from, and no other."""
    sizes = {"clip": VisionConfig(), "siglip": VISION["siglip_so400m_14_384"]}
    model = ModelConfig(vision=sizes[kind], language=replace(LANGUAGE, **switches))
    other = replace(model, language=replace(model.language, num_layers=9))
    written = [published_config(model)]
    written += [llava_config(model, 32064, 32000, 576)] if len(switches) < 2 else []
    for config in written:
        require_same_model(config, model, "there")
        assert "model.language.num_layers: 8 in the checkpoint, 9 in the recipe" in refusal(config, other)
    plain = replace(model, language=replace(LANGUAGE, qk_norm=not model.language.qk_norm))
    assert "model.language.qk_norm: " in refusal(written[0], plain)
    del written[0]["decoder"]  # as earlier releases wrote it
    require_same_model(written[0], model, "there")
