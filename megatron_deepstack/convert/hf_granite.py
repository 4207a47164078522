"""What Granite 4 Vision's config.json says beside its tower and decoder: which states become stacks, where, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.config.traits.towers import TOWERS
from megatron_deepstack.convert.hf_written import select_strategy
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.planning.slots import decoder_slots
from megatron_deepstack.planning.views import read_tile_grids

_SPATIAL_LAYERS: Final = (12, 15, 18, 21)
"""Decoder layers of the sampled stacks where a config names none."""
_PINPOINTS: Final = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Heights and widths of resized images where a config names none."""
_HEAD_WIDTH: Final = 64
"""Width of a Q-Former's head, whatever its config says."""
_SAMPLED: Final = 4
_QFORMER_DEFAULTS: Final[Mapping[str, Any]] = {
    "num_hidden_layers": 1,
    "intermediate_size": 3072,
    "cross_attention_frequency": 1,
    "use_qformer_text_input": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
_QFORMER_IGNORED_TEXT = """
    _name_or_path architectures attention_probs_dropout_prob chunk_size_feed_forward dtype encoder_hidden_size
    hidden_dropout_prob hidden_size initializer_range max_position_embeddings model_type num_attention_heads
    output_attentions output_hidden_states pad_token_id return_dict transformers_version use_cache vocab_size
"""
_QFORMER_IGNORED: Final = frozenset(_QFORMER_IGNORED_TEXT.split())
"""Keys of a Q-Former's config that change nothing: widths follow from the tower, and dropout is for training only."""


def granite_sections(config: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Read the stacks of a Granite 4 Vision.

    Args:
        config: Content of config.json.
        vision: The recipe's section `model.vision` that its tower's config gives.
        where: The file, for messages.

    Returns:
        Fields of the sections `vision`, `stacks` and `qformer` of a recipe's model.

    Raises:
        CheckpointError: A key has a value that is not computed here; the message names it.
    """
    _require_agreement(config, str(vision["kind"]), where)
    pairs = config.get("deepstack_layer_map")
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise CheckpointError(f"{where}: deepstack_layer_map: found {pairs!r}, expected pairs of layers")
    sampled = config.get("spatial_target_layers")
    sampled = list(_SPATIAL_LAYERS) if sampled is None else sampled
    if not isinstance(sampled, list) or len(sampled) != _SAMPLED or not all(map(_is_whole, sampled)):
        raise CheckpointError(
            f"{where}: spatial_target_layers: found {sampled!r}, expected {_SAMPLED} layers, one for each projector"
        )
    spatial = config.get("spatial_vision_layer", -1)
    layers = int(vision["num_layers"])
    taps = [_tap("deepstack_layer_map", state, layers, where) for state, _ in pairs]
    taps += [_tap("spatial_vision_layer", spatial, layers, where)] * len(sampled)
    slots = [slot for _, slot in pairs] + sampled
    twice = sorted({slot for slot in slots if slots.count(slot) > 1})
    if twice:
        raise CheckpointError(
            f"{where}: deepstack_layer_map and spatial_target_layers: two stacks enter before the layers {twice}, of "
            "which transformers keeps the last only; give each stack a layer of its own"
        )
    return {
        "vision": {
            "taps": taps,
            "select_layer": max(taps) - layers,
            "tile_grids": _tile_grids(config, int(vision["image_size"]), where),
        },
        "stacks": {"slots": slots},
        "qformer": {"num_sampled": len(sampled), **_qformer(config, vision, where)},
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    """Whether this is a state of the tower, which `_tap` looks at, and a layer of the decoder."""
    return isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[1])


def _require_agreement(config: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuse a tower whose tokens are not those that are taken, and an image token with two numbers."""
    computed = "default" if TOWERS[kind].has_class_token else "full"
    strategy = config.get("vision_feature_select_strategy") or "default"
    if strategy != computed:
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy: found {strategy!r}, expected {computed!r} for a {kind} tower: "
            "`default` leaves out the first token, which must be the one that stands for no patch"
        )
    numbers = {key: config[key] for key in ("image_token_index", "image_token_id") if config.get(key) is not None}
    if len(set(numbers.values())) > 1:
        raise CheckpointError(f"{where}: found {numbers}, two numbers of one token; remove one of them")


def _tile_grids(config: Mapping[str, Any], tile: int, where: str) -> list[str]:
    """The grids of tiles, from the sizes (height, width) to which an image may be resized."""
    given = config.get("image_grid_pinpoints")
    sizes = _PINPOINTS if given is None else given
    try:
        pairs = [(int(high), int(wide)) for high, wide in sizes]
    except (TypeError, ValueError):
        pairs = []
    odd = [pair for pair in pairs if min(pair) < tile or pair[0] % tile or pair[1] % tile]
    if odd or not pairs:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints: found {odd or given!r}, expected pairs of height and width, multiples of "
            f"the {tile} pixels of a view"
        )
    return [f"{wide // tile}x{high // tile}" for high, wide in pairs]


def _tap(key: str, state: Any, layers: int, where: str) -> int:
    """The layer whose output is a state, numbered as in transformers: state 0 is what enters the first layer."""
    if not isinstance(state, int) or not -layers <= state <= layers or state == 0:
        raise CheckpointError(
            f"{where}: {key}: found the state {state!r} of the tower, expected 1 to {layers} or -1 to -{layers}: the "
            "output of one of its layers"
        )
    return state - 1 if state > 0 else layers + state


def _qformer(config: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> dict[str, Any]:
    rate = str(config.get("downsample_rate"))
    sides = rate.split("/")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise CheckpointError(f"{where}: downsample_rate: found {rate!r}, expected two sides such as '4/8'")
    query, window = map(int, sides)
    patches = int(vision["image_size"]) // int(vision["patch_size"])
    if patches % window or query * 2 != window:
        raise CheckpointError(
            f"{where}: downsample_rate: found {rate!r}; the second number must divide the {patches} patches of a side, "
            "and be twice the first, since sampled stacks take one patch of 2x2"
        )
    given = {**_QFORMER_DEFAULTS, **(config.get("qformer_config") or {})}
    unknown = [key for key in given if key not in _QFORMER_DEFAULTS and key not in _QFORMER_IGNORED]
    unknown = [key for key in unknown if given[key] not in (None, False)]
    if unknown or given["use_qformer_text_input"]:
        named = unknown or ["use_qformer_text_input"]
        raise CheckpointError(
            f"{where}: qformer_config: {', '.join(named)} may change the result and is not known here"
        )
    width = int(vision["hidden_size"])
    if width % _HEAD_WIDTH:
        raise CheckpointError(
            f"{where}: vision_config.hidden_size: found {width}, expected a multiple of {_HEAD_WIDTH}: transformers "
            "gives a Q-Former heads of that width"
        )
    return {
        "query_side": query,
        "window_side": window,
        "num_layers": given["num_hidden_layers"],
        "num_heads": width // _HEAD_WIDTH,
        "ffn_hidden_size": given["intermediate_size"],
        "cross_attention_interval": given["cross_attention_frequency"],
        "activation": {"gelu_pytorch_tanh": "gelu_tanh"}.get(given["hidden_act"], given["hidden_act"]),
        "layernorm_epsilon": given["layer_norm_eps"],
    }


def granite_keys(model: ModelConfig) -> dict[str, Any]:
    """Write the keys that `granite_sections` reads.

    Args:
        model: The recipe's model.

    Returns:
        Keys of config.json.
    """
    qformer, layers = model.qformer, model.vision.num_layers
    slots = list(decoder_slots(model))
    averaged = len(slots) - qformer.num_sampled
    states = [tap - layers for tap in model.vision.taps]
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(str(qformer.activation), str(qformer.activation))
    side, grids = model.vision.image_size, read_tile_grids(model.vision.tile_grids)
    return {
        "vision_feature_select_strategy": select_strategy(model.vision),
        "image_grid_pinpoints": [[rows * side, columns * side] for columns, rows in grids],
        "deepstack_layer_map": [list(pair) for pair in zip(states[:averaged], slots[:averaged], strict=True)],
        "spatial_vision_layer": states[-1],
        "spatial_target_layers": slots[averaged:],
        "downsample_rate": f"{qformer.query_side}/{qformer.window_side}",
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": qformer.num_layers,
            "intermediate_size": qformer.ffn_hidden_size,
            "cross_attention_frequency": qformer.cross_attention_interval,
            "use_qformer_text_input": False,
            "hidden_act": activation,
            "layer_norm_eps": qformer.layernorm_epsilon,
        },
    }
