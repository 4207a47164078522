"""How the parameters of routers and experts correspond to published tensors; see `weights` for all others."""

from __future__ import annotations

from megatron_deepstack.config.schema import LanguageConfig
from megatron_deepstack.model.language import LanguageChunk
from megatron_deepstack.model.rules import Rule, Rules


def own_experts(chunk: LanguageChunk) -> range:
    """Numbers of the experts that this rank holds in each layer that has experts."""
    group, number = chunk.pg_collection.ep, chunk.language.num_experts
    count = number // group.size()
    return range(group.rank() * count, (group.rank() + 1) * count)


def expert_rules(prefix: str, language: LanguageConfig, experts: range) -> Rules:
    """What the parameters of a layer's router and experts are made of; each expert has tensors of its own.

    Args:
        prefix: What the published names of the layer's tensors begin with.
        language: The decoder.
        experts: Numbers of the experts that the rank holds.

    Returns:
        Rules by the parameter's name in the layer, for experts computed one by one and for grouped products.
    """
    h, f = language.hidden_size, language.expert_ffn_hidden_size
    rules = {"mlp.router.weight": Rule(names=(f"{prefix}mlp.gate.weight",), shapes=((language.num_experts, h),))}
    for local, expert in enumerate(experts):
        own = f"{prefix}mlp.experts.{expert}."
        names = (f"{own}gate_proj.weight", f"{own}up_proj.weight")
        gate_and_up = Rule(names=names, shapes=((f, h), (f, h)), is_expert=True)
        down = Rule(names=(f"{own}down_proj.weight",), shapes=((h, f),), is_expert=True)
        for linear, rule in (("linear_fc1", gate_and_up), ("linear_fc2", down)):
            rules[f"mlp.experts.local_experts.{local}.{linear}.weight"] = rule
            rules[f"mlp.experts.{linear}.weight{local}"] = rule
    return rules
