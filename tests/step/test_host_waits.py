"""Nothing inside the schedule makes the host wait for the device, and a fixed handful of places in a step do.

Counted on the CPU (`testing.host_reads`) over one step of the tiny model on local layers, optimizer included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_deepstack.config.choices import Batching, EncoderPlacement, Precision, Recompute
from megatron_deepstack.config.schema import ParallelConfig, Recipe
from megatron_deepstack.testing.ranks import RankPool
from megatron_deepstack.testing.tiny import tiny_recipe

Pools = Callable[[int], RankPool]
Sites = dict[str, int]


def sites_of_a_step(rank: int, recipe: Recipe) -> tuple[Sites, Sites]:
    """Reads and uploads by site."""
    from megatron_deepstack.testing.host_reads import HostReads
    from megatron_deepstack.testing.trial import run_trial

    found = HostReads()
    run_trial(rank, replace(recipe, train=replace(recipe.train, steps=1)), watch=found)
    return dict(found.reads), dict(found.uploads)


def packed(**parallel: object) -> Recipe:
    recipe = tiny_recipe(parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    return replace(recipe, train=replace(recipe.train, batching=Batching.PACKED, seq_length=128))


CASES = {
    "padded": (1, tiny_recipe()),
    "bf16": (1, tiny_recipe(precision=Precision.BF16)),
    "packed": (1, packed()),
    "packed-recompute": (1, packed(recompute=Recompute.FULL)),
    "packed-pp2": (2, packed(pipeline=2)),
    "packed-cp2": (2, packed(context=2)),
    "inline": (1, tiny_recipe(parallel=ParallelConfig(encoder_placement=EncoderPlacement.INLINE))),
    "cp2": (2, tiny_recipe(parallel=ParallelConfig(context=2))),
    "pp2-vpp2": (2, tiny_recipe(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))),
}
READS = {
    "step megatron_deepstack/parallel/reduce.py:loss_and_tokens": 1,
    "step megatron/core/utils.py:local_multi_tensor_l2_norm": 2,  # where Transformer Engine is absent
    "step megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 2,  # decoder and encoder
    "step megatron/core/optimizer/optimizer.py:has_grad_norm_group": 2,  # once in a run, since megatron-core 0.19
}
"""Places that may read the device, and how often in a step."""
UPLOADS_IN_SCHEDULE = {
    # Of pixels that are on the device already, micro-batch by micro-batch where they are encoded inline.
    "schedule megatron_deepstack/model/vision/vit.py:normalise": 4,
    # Made once for each power of 2 that a length of sequence needs, and kept.
    "schedule megatron/core/models/common/embeddings/rotary_pos_embedding.py:get_emb": 2,
}


@pytest.mark.parametrize(("num_ranks", "recipe"), CASES.values(), ids=CASES)
def test_reads_and_uploads_of_a_step(ranks: Pools, num_ranks: int, recipe: Recipe) -> None:
    for reads, uploads in ranks(num_ranks).run(sites_of_a_step, recipe):
        grown = {site: count for site, count in reads.items() if count > READS.get(site, 0)}
        assert not grown, f"the host waits for the device more often than before: {grown}"
        in_schedule = {site: count for site, count in uploads.items() if site.startswith("schedule")}
        grown = {site: count for site, count in in_schedule.items() if count > UPLOADS_IN_SCHEDULE.get(site, 0)}
        assert not grown, f"the schedule uploads what could have been uploaded before it: {grown}"


def look(tensor: object) -> None:
    int(tensor)  # type: ignore[call-overload]


def test_each_way_to_read_is_seen() -> None:
    """By the function that asks."""
    import torch

    from megatron_deepstack.testing.host_reads import HostReads

    numbers = torch.arange(3)
    with HostReads() as found:
        look(numbers[1])
        numbers.tolist()
        numbers.cpu()
        numbers.sum().item()
        bool(numbers[0] > 0)
        numbers.nonzero()
        numbers[numbers > 0]
        numbers[numbers > 5] = torch.zeros(0, dtype=torch.int64)
        numbers[numbers > 1] = 0  # known to torch as a fill, which reads nothing
        torch.tensor([1], device=torch.device("cpu"))
    here = "step test_host_waits.py:"
    assert found.reads == {f"{here}look": 1, f"{here}test_each_way_to_read_is_seen": 7}
    assert found.uploads == {f"{here}test_each_way_to_read_is_seen": 1}
