"""The stage plan as one JSON document, for programs; `plan_text` presents the same plan to people."""

from __future__ import annotations

from typing import Any

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.planning.check import model_ranks
from megatron_deepstack.planning.exchange.vit_stacks import plan_vit_stacks
from megatron_deepstack.planning.slots import decoder_slots, stage_chunks


def plan_document(recipe: Recipe, num_ranks: int) -> dict[str, Any]:
    """Describe which stage holds which layers and stacks.

    Args:
        recipe: A recipe whose layout has been checked.
        num_ranks: Number of all processes, a multiple of a replica's.

    Returns:
        Plain values. Layers and stacks are 0-based; `slot` is the layer before which a stack is added; `vit_stacks` is
        null unless stacks enter the ViT.
    """
    slots, parallel = decoder_slots(recipe.model), recipe.parallel
    vit = plan_vit_stacks(recipe.model) if recipe.model.variant.stacks_in_vit else None
    return {
        "name": recipe.name,
        "variant": str(recipe.model.variant),
        "num_layers": recipe.model.language.num_layers,
        "layout": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "data": num_ranks // model_ranks(parallel),
        },
        "ranks": num_ranks,
        "ranks_per_replica": model_ranks(parallel),
        "stages": [
            {
                "stage": chunk.pp,
                "chunk": chunk.vpp,
                "layers": list(range(chunk.first, chunk.stop)),
                "stacks": [
                    {"stack": stack, "slot": slot}
                    for stack, slot in enumerate(slots)
                    if chunk.first <= slot < chunk.stop
                ],
                "embedding": chunk.has_embedding,
                "head": chunk.has_head,
            }
            for chunk in stage_chunks(recipe.model.language.num_layers, parallel)
        ],
        "vit_stacks": None if vit is None else {"slots": list(vit.slots), "dropped": list(vit.dropped)},
    }
