"""Questions as the ranks take them: prompts by the run's template, and views by the run's processor.

The processor is that of the store the run was trained on, as the store records it, so that a picture gives the pixels
that the store would hold. Where no store of the run can be read any more, the run's recipe says the same, unless the
store was made with other options than the run's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import DataConfig, ModelConfig, Recipe
from megatron_deepstack.data.images.processor import ProcessedImage
from megatron_deepstack.data.images.processors import AnyProcessor, described_processor, processor_of
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.images.source import QuarantineError, read_image
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.records.turns import Role, Turn
from megatron_deepstack.data.store.attributes import StoreAttributes, parse_attributes, read_document
from megatron_deepstack.data.store.blocks import from_blocks
from megatron_deepstack.data.text.conversation import encode_conversation, encode_prompt, known_template
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.errors import DataError, StoreError
from megatron_deepstack.inference.questions import Question, plan_question
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN
from megatron_deepstack.planning.views import ImageShape, stored_shape


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as the user gives it."""

    text: str
    pictures: tuple[str | bytes, ...] = ()
    """Paths or URLs, or the content of image files."""
    history: tuple[Turn, ...] = ()
    """What was said before, in turn: question, answer. Its pictures come before those of the question."""
    id: str = ""
    """Name of the question in a file of questions."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question as the ranks take it."""

    prompt: np.ndarray
    """int32 (T,), with one placeholder per picture."""
    pictures: tuple[ProcessedImage, ...]
    room: int
    """Tokens that an answer may have, up to the end of the context; at least 1."""


@dataclass(frozen=True, slots=True)
class Framed:
    """What a plan asks of a picture."""

    grid: ImageShape


@dataclass(frozen=True, slots=True)
class LoadedPictures:
    """The pictures of some questions as a source of views."""

    processor: AnyProcessor
    """By which they were made."""
    pictures: tuple[ProcessedImage, ...]

    @property
    def crop_size(self) -> int:
        """Side S of a view in pixels, if all views have one size."""
        assert not isinstance(self.processor, SizedProcessor), "views of any size have no common side"
        return self.processor.crop_size

    def image(self, index: int) -> Framed:
        """The picture of that number."""
        picture = self.pictures[index]
        return Framed(stored_shape(self.processor.layout, picture.grid, picture.size))

    def read_views(self, image: int, views: Sequence[int]) -> np.ndarray:
        """Views of one picture; all views have one size.

        Args:
            image: The picture's number.
            views: Numbers of its views, in any order; view 0 is the global view.

        Returns:
            uint8 (len(views), S, S, 3), in the order of `views`.
        """
        return self.pictures[image].slots[list(views)]

    def read_flat(self, images: Sequence[int]) -> np.ndarray:
        """uint8 (bytes,): the one view of each picture, one after another, if views may have any size."""
        assert isinstance(self.processor, SizedProcessor), "views of one size are read by `read_views`"
        views = [np.empty(0, np.uint8)]
        for image in images:
            _, height, width = self.pictures[image].grid
            side = self.processor.patch_size
            views.append(from_blocks(self.pictures[image].slots, (height * side, width * side, 3)).reshape(-1))
        return np.concatenate(views)


@dataclass(frozen=True, slots=True)
class Preparation:
    """All that turns questions into token ids and views."""

    model: ModelConfig
    processor: AnyProcessor
    tokenizer: Tokenizer
    template: Template
    context: int
    """Positions of prompt and answer together."""
    context_name: str
    """Where that number stands, for messages."""

    @classmethod
    def of_run(cls, recipe: Recipe, tokenizer: Tokenizer, say: Callable[[str], None]) -> Preparation:
        """As the run's samples were prepared.

        Args:
            recipe: The run's recipe.
            tokenizer: Its tokenizer.
            say: Called with a line if no store of the run can be read.

        Returns:
            The preparation.

        Raises:
            DataError: The tokenizer is not the one that the store was made with.
        """
        made, from_recipe = store_attributes(recipe), cls.of_recipe(recipe, tokenizer, "train.seq_length")
        if made is None:
            stores = ", ".join(recipe.data.stores or (recipe.data.store or "none",))
            say(f"ask: no store of the run is there ({stores}); pictures are prepared as its recipe says")
            return from_recipe
        if made.tokenizer["sha256"] != tokenizer.fingerprint:
            raise DataError(
                f"{tokenizer.source}: has sha256 {tokenizer.fingerprint[:12]}..., the tokenizer of the store that the "
                f"run learned from had {made.tokenizer['sha256'][:12]}..., so ids would mean other words; name that "
                "one with data.tokenizer=PATH"
            )
        return replace(
            from_recipe,
            processor=described_processor(made.processor),
            template=known_template(made.tokenizer["template"]),
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe, tokenizer: Tokenizer, context_name: str) -> Preparation:
        """As a recipe says, whatever its stores are.

        Args:
            recipe: The recipe.
            tokenizer: The model's tokenizer.
            context_name: Where `train.seq_length` comes from, for messages.

        Returns:
            The preparation.
        """
        return cls(
            model=recipe.model,
            processor=processor_of(recipe),
            tokenizer=tokenizer,
            template=recipe.data.template,
            context=recipe.train.seq_length,
            context_name=context_name,
        )

    def prepare(self, asked: Asked) -> Prepared:
        """Read the pictures and write the prompt.

        Args:
            asked: The question.

        Returns:
            What the ranks need.

        Raises:
            DataError: A picture cannot be used, the text names another number of pictures, or the prompt is too long.
        """
        pictures = tuple(self.read(picture) for picture in asked.pictures)
        earlier = sum(turn.text.count(IMAGE_TOKEN) for turn in asked.history)
        prompt = encode_prompt(
            asked.text,
            self.template,
            self.tokenizer,
            num_images=len(pictures) - earlier,
            history=asked.history,
        )
        prepared = Prepared(prompt=prompt, pictures=pictures, room=1)
        length = plan_question(self.question(prepared, 0, 0), self.views([prepared]), self.model, 0).sequence.length
        if length >= self.context:
            visual = length - int((prompt >= 0).sum())
            raise DataError(
                f"the question {_short(asked.text)!r} takes {length} positions, {visual} of them for "
                f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}, and the model's context has "
                f"{self.context} ({self.context_name}), with the answer. Ask a shorter question, or give fewer pictures"
            )
        return Prepared(prompt=prompt, pictures=pictures, room=self.context - length)

    def prepare_answered(self, asked: Asked, answer: str) -> tuple[Prepared, tuple[int, ...]]:
        """The same for a question whose answer is given, encoded as in training.

        Args:
            asked: The question.
            answer: The answer's text.

        Returns:
            The question, and the answer's token ids without the end of the turn; at least one.

        Raises:
            DataError: As `prepare`, or the answer is empty or has no room.
        """
        prepared = self.prepare(asked)
        turns = [Turn(Role.HUMAN, IMAGE_TOKEN), Turn(Role.GPT, answer)]
        tokens, learned = encode_conversation(turns, self.template, self.tokenizer)
        ids = tuple(tokens[learned == 1].tolist())[:-1]
        if not 0 < len(ids) <= prepared.room:
            raise DataError(
                f"the answer {_short(answer)!r} takes {len(ids)} positions, and there is room for 1 to {prepared.room} "
                f"({self.context_name} {self.context})"
            )
        return prepared, ids

    def read(self, picture: str | bytes) -> ProcessedImage:
        """One picture's views. Raises DataError, with the file's name, if it cannot be used."""
        try:
            if isinstance(picture, bytes):
                return self.processor.process(picture)
            return self.processor.process(read_image(Location.parse(picture), self.processor.max_image_pixels))
        except QuarantineError as error:
            name = "a picture without a file" if isinstance(picture, bytes) else picture
            raise DataError(f"{name}: {error}; give another picture") from error

    def question(self, prepared: Prepared, number: int, first_picture: int) -> Question:
        """A prepared question as generation takes it.

        Args:
            prepared: The question.
            number: Its number among those that were asked.
            first_picture: Number of its first picture among all of the batch.

        Returns:
            The question.
        """
        return Question(
            index=number,
            id=str(number),
            text="",
            expected="",
            prompt=prepared.prompt,
            images=tuple(range(first_picture, first_picture + len(prepared.pictures))),
        )

    def views(self, batch: Sequence[Prepared]) -> LoadedPictures:
        """The pictures of a batch, one question's after the other's."""
        pictures = tuple(picture for prepared in batch for picture in prepared.pictures)
        return LoadedPictures(self.processor, pictures)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def prepared_data(recipe: Recipe) -> DataConfig:
    """The section `data` of a run, with what its store says about how samples were really prepared.

    Args:
        recipe: The run's recipe.

    Returns:
        The section as it is if no store of the run is there.
    """
    made = store_attributes(recipe)
    if made is None:
        return recipe.data
    processor = described_processor(made.processor)
    data = recipe.data
    if isinstance(processor, SizedProcessor):
        data = replace(data, min_pixels=processor.min_pixels, max_pixels=processor.max_pixels)
    return replace(
        data,
        template=known_template(made.tokenizer["template"]),
        resize=processor.resize,
        orientation=processor.orientation,
        deep_grey=processor.deep_grey,
        transparency=processor.transparency,
        max_image_pixels=processor.max_image_pixels,
    )


def store_attributes(recipe: Recipe) -> StoreAttributes | None:
    """What the first store of the run that is still there says about itself.

    Args:
        recipe: The run's recipe.

    Returns:
        Its attributes; None if no store is there.
    """
    for path in recipe.data.stores or (recipe.data.store,):
        if path is None:
            continue
        location = Location.parse(path)
        try:
            return parse_attributes(location, read_document(location))
        except StoreError:
            continue  # it has been removed or moved; the caller says so
    return None
