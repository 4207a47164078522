"""Placeholders opened up, targets shifted, and what does not fit refused."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.sequence import expand, padded_length
from megatron_deepstack.planning.batch.tokens import IGNORE_INDEX, IMAGE_TOKEN_ID


def test_images_open_where_they_stand() -> None:
    tokens = np.array([5, IMAGE_TOKEN_ID, 6, IMAGE_TOKEN_ID, 7])
    sample = expand("s", tokens, np.array([0, 0, 0, 0, 1]), [3, 2], seq_length=99, truncate=False)
    assert sample.tokens.tolist() == [5, 0, 0, 0, 6, 0, 0, 7]
    assert sample.labels.tolist() == [IGNORE_INDEX] * 6 + [7, IGNORE_INDEX]
    assert [(s.image, s.start, s.length) for s in sample.spans] == [(0, 1, 3), (1, 5, 2)]


def test_a_target_is_predicted_one_position_earlier() -> None:
    sample = expand("s", np.array([1, 2, 3]), np.array([1, 0, 1]), [], seq_length=9, truncate=False)
    assert sample.labels.tolist() == [IGNORE_INDEX, 3, IGNORE_INDEX]


def test_truncation_keeps_no_target_beyond_the_end() -> None:
    tokens = np.array([1, IMAGE_TOKEN_ID, 2, 3])
    sample = expand("s", tokens, np.array([0, 0, 1, 1]), [4], seq_length=6, truncate=True)
    assert sample.tokens.tolist() == [1, 0, 0, 0, 0, 2]
    assert sample.labels.tolist() == [IGNORE_INDEX] * 4 + [2, IGNORE_INDEX]


@pytest.mark.parametrize(
    ("lengths", "words"),
    [([4, 4], "1 image placeholders but 2 images"), ([40], "43 tokens, 40 of them visual, exceed train.seq_length 8")],
    ids=["images", "too long"],
)
def test_what_does_not_fit_is_refused(lengths: list[int], words: str) -> None:
    tokens = np.array([1, IMAGE_TOKEN_ID, 2, 3])
    with pytest.raises(DataError, match=f"sample doc-7: {words}"):
        expand("doc-7", tokens, np.zeros(4, int), lengths, seq_length=8, truncate=False)


@pytest.mark.parametrize(
    ("parallel", "length"),
    [
        (ParallelConfig(), 13),
        (ParallelConfig(tensor=4), 13),
        (ParallelConfig(tensor=4, sequence_parallel=True), 16),
        (ParallelConfig(context=2), 16),
        (ParallelConfig(context=2, tensor=2, sequence_parallel=True), 16),
        (ParallelConfig(context=4), 16),
    ],
)
def test_padding_is_what_the_splits_need(parallel: ParallelConfig, length: int) -> None:
    assert padded_length([7, 13], parallel) == length
