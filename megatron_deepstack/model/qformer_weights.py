"""The rules by which parameters of window Q-Formers become published tensors, and the other way round."""

from __future__ import annotations

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.model.layers.lora import is_adapter
from megatron_deepstack.model.rules import Rule, Rules
from megatron_deepstack.model.vision.qformer import QFormers

_QFORMER_NAMES = {
    "query": "query",
    "positions": "image_positions",
    "norm": "norm",
    "query_norm": "qformer.layernorm",
    "out": "out_linear",
}
_QFORMER_LAYER_NAMES = {
    **{
        f"{ours}.{own}": f"{theirs}.{published}"
        for ours, theirs in {"among": "attention", "across": "crossattention"}.items()
        for own, published in {
            "query": "attention.query",
            "key": "attention.key",
            "value": "attention.value",
            "out": "output.dense",
            "norm": "output.LayerNorm",
        }.items()
    },
    "fc1": "intermediate_query.dense",
    "fc2": "output_query.dense",
    "norm": "output_query.LayerNorm",
}
"""Names of a Q-Former and of its layers, and those that Granite 4 Vision has for them."""


def qformer_rules(projector: QFormers, model: ModelConfig, prefix: str) -> Rules:
    """What the parameters of window Q-Formers are made of; nothing is split.

    First come those whose queries begin with averages, then those that begin with samples.

    Args:
        projector: The Q-Formers; they may be on the meta device.
        model: The recipe's model.
        prefix: What the published names of a projector begin with.

    Returns:
        Rules by the parameter's name in the encoder.
    """
    num_averaged = len(model.vision.taps) - model.qformer.num_sampled
    rules = {}
    for name, parameter in projector.named_parameters():
        if is_adapter(name):
            continue  # named after the linear that it stands beside
        _, number, own = name.split(".", 2)
        stack = int(number)
        kind_of_stack = ("layerwise", stack) if stack < num_averaged else ("spatial", stack - num_averaged)
        place = "{}_projectors.{}".format(*kind_of_stack)
        module, _, kind = own.rpartition(".")
        if module.startswith("layers."):
            _, layer, inner = module.split(".", 2)
            published = f"qformer.encoder.layer.{layer}.{_QFORMER_LAYER_NAMES[inner]}.{kind}"
        else:
            published = f"{_QFORMER_NAMES[module]}.{kind}" if module else _QFORMER_NAMES[kind]
        names = (f"{prefix}{place}.{published}",)
        rules[f"projector.{name}"] = Rule(names=names, shapes=(tuple(parameter.shape),))
    return rules
