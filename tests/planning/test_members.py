"""Which tokens of a micro-batch belong to which sample, on each rank."""

from __future__ import annotations

import numpy as np

from megatron_deepstack.parallel.context import zigzag
from megatron_deepstack.planning.batch.members import Member, members_of, membership
from megatron_deepstack.planning.batch.packing import filler, merge
from megatron_deepstack.testing.tiny import tiny_qwen3_vl_moe, tiny_samples

MODEL = tiny_qwen3_vl_moe()
SAMPLES = [sample.planned(MODEL, 256) for sample in tiny_samples(MODEL, 3)]
LENGTHS = [sample.sequence.length for sample in SAMPLES]


def test_padding_within_and_behind_a_pack_is_nobodys() -> None:
    members = members_of([merge(SAMPLES, multiple=4)])
    assert [member.stop - member.begin for member in members] == LENGTHS
    assert all(member.begin % 4 == 0 for member in members)
    length = members[-1].stop + 5
    owners, sizes = membership(members, 1, np.arange(length))
    assert np.bincount(owners[owners >= 0]).tolist() == LENGTHS
    assert (owners < 0).sum() == length - sum(LENGTHS)
    assert sizes[:, 1].tolist() == LENGTHS
    assert sizes[:, 0].sum() == sum(member.num_targets for member in members_of(SAMPLES))


def test_rows_of_a_padded_micro_batch_alternate() -> None:
    members = members_of(SAMPLES[:2])
    assert [member.row for member in members] == [0, 1]
    owners, _ = membership(members, 2, np.arange(max(LENGTHS)))
    by_row = owners.reshape(-1, 2)
    assert [(by_row[:, row] == row).sum() for row in (0, 1)] == LENGTHS[:2]
    assert set(by_row[:, 0].tolist()) <= {0, -1}


def test_ranks_that_share_a_sequence_have_each_token_once() -> None:
    members = members_of([merge(SAMPLES, multiple=8)])
    ends = tuple(-(-member.stop // 8) * 8 for member in members)
    own = [piece for rank in (0, 1) for piece in np.split(zigzag(ends, 2, rank), 2)]
    counts = sum(np.bincount(membership(members, 1, piece)[0] + 1, minlength=4)[1:] for piece in own)
    assert counts.tolist() == LENGTHS


def test_a_filler_weighs_nothing() -> None:
    assert members_of([filler(4)]) == (Member(row=0, begin=0, stop=4, num_targets=0),)
