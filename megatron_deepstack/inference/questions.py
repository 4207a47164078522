"""Questions in a store: a sample up to its first learned token, and the answer that is expected there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.conversation import question_of
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.planning.batch.sequence import expand
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.exchange.routes import PlannedSample
from megatron_deepstack.planning.exchange.rows import context_length
from megatron_deepstack.planning.views import ImageShape


class Picture(Protocol):
    """What a plan needs to know about an image."""

    @property
    def grid(self) -> ImageShape:
        """Crops across and down, or the patches of the one view."""


class Views(Protocol):
    """Where the views of questions' images come from: a store, or pictures that were processed just now."""

    @property
    def crop_size(self) -> int:
        """Side S of a view in pixels, if all views have one size."""

    def image(self, index: int) -> Picture:
        """The image of that number."""

    def read_views(self, image: int, views: Sequence[int]) -> np.ndarray:
        """Views of one image, if all views have one size.

        Args:
            image: The image's number.
            views: Numbers of its views, in any order; view 0 is the global view.

        Returns:
            uint8 (len(views), S, S, 3), in the order of `views`.
        """

    def read_flat(self, images: Sequence[int]) -> np.ndarray:
        """uint8 (bytes,): the one view of each image, one after another; if views have any size."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its images."""

    index: int
    """Its number: the sample's index in a store, or the place among the questions that were asked."""
    id: str
    text: str
    expected: str
    prompt: np.ndarray
    """int32 (T,) tokens up to the answer, with one IMAGE_TOKEN_ID per image."""
    images: tuple[int, ...]
    """Numbers of its images in the source of views."""


def read_question(store: Store, index: int, tokenizer: Tokenizer) -> Question:
    """The first question of a sample; everything after its answer is left out.

    Args:
        store: The store.
        index: The sample's number.
        tokenizer: The store's tokenizer.

    Returns:
        The question, with the expected answer.
    """
    sample = store.sample(index)
    learned = np.flatnonzero(sample.loss_mask)
    begin = int(learned[0]) if len(learned) else len(sample.tokens)
    end = begin
    while end < len(sample.tokens) and sample.loss_mask[end]:
        end += 1
    prompt = sample.tokens[:begin]
    num_images = int((prompt == IMAGE_TOKEN_ID).sum())
    return Question(
        index=index,
        id=sample.id,
        text=question_of(prompt.tolist(), store.attributes.tokenizer["template"], tokenizer),
        expected=tokenizer.decode(sample.tokens[begin:end].tolist()).strip(),
        prompt=prompt,
        images=sample.images[:num_images],
    )


def plan_question(question: Question, views: Views, model: ModelConfig, max_new_tokens: int) -> PlannedSample:
    """The prompt with its images expanded, and with space for the answer after it.

    Args:
        question: The question.
        views: The source of its images.
        model: Determines how many tokens an image takes.
        max_new_tokens: Positions for the answer; 0 for the prompt alone.

    Returns:
        The planned sample.
    """
    grids = tuple(views.image(image).grid for image in question.images)
    room = np.zeros(max_new_tokens, np.int64)
    sequence = expand(
        question.id,
        np.concatenate([question.prompt.astype(np.int64), room]),
        np.zeros(len(question.prompt) + max_new_tokens, np.int64),
        [context_length(model, grid) for grid in grids],
        seq_length=1 << 30,
        truncate=False,
    )
    return PlannedSample(sequence=sequence, grids=grids)
