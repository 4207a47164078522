"""The plan of a preprocessing job, as a pure function of recipe, records and tokenizer.

A *part* is the unit of work and of resuming: 64 images (one shard), or 1024 records to tokenise. Everything that
decides the store's bytes is in the plan's description, and the description's hash names the plan: parts made under
another hash are never mixed in. Images are stored once, in the order in which the records first name them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, TypeVar

from megatron_deepstack.config.choices import Compression
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.processors import AnyProcessor, processor_of
from megatron_deepstack.data.images.sized_processor import SizedProcessor
from megatron_deepstack.data.images.source import TarMember
from megatron_deepstack.data.records.record import Record
from megatron_deepstack.data.store.schema import FORMAT, SlotsShape
from megatron_deepstack.data.text.tokenizer import Tokenizer
from orchestration.preprocess.sources.inputs import Inputs
from orchestration.preprocess.sources.videos import FramePair

_Item = TypeVar("_Item")

RECORDS_PER_PART: Final = 1024
"""Records tokenised by one task, about 0.3 s of work."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Images that become one shard."""

    number: int
    paths: tuple[str, ...]
    members: Mapping[str, TarMember]
    """Where those of them are that lie in tar shards."""
    frames: Mapping[str, FramePair] = field(default_factory=dict)
    """Those of them that are pairs of a video's frames."""

    @property
    def name(self) -> str:
        """Name of the part's commit record."""
        return f"images-{self.number:06d}"


@dataclass(frozen=True, slots=True)
class TextPart:
    """Records that are tokenised together."""

    number: int
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """Name of the part's commit record."""
        return f"text-{self.number:06d}"


Part = ImagePart | TextPart


@dataclass(frozen=True)
class Plan:
    """What is to be done, and in which order it is written down."""

    description: dict[str, Any]
    """Everything that decides the store's bytes, as plain JSON values."""
    processor: AnyProcessor
    template: str
    records: Sequence[Record]
    images: tuple[str, ...]
    """Unique image paths, in the order in which the records first name them."""
    images_per_part: int
    compression: Compression
    members: Mapping[str, TarMember]
    """Where those of the images are that lie in tar shards."""
    frames: Mapping[str, FramePair] = field(default_factory=dict)
    """Those of the images that are pairs of a video's frames."""

    @cached_property
    def hash(self) -> str:
        """sha256 of the description."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @cached_property
    def image_parts(self) -> tuple[ImagePart, ...]:
        """Parts of images, in store order."""
        groups = _groups(self.images, self.images_per_part)
        return tuple(self._image_part(number, tuple(paths)) for number, paths in enumerate(groups))

    def _image_part(self, number: int, paths: tuple[str, ...]) -> ImagePart:
        frames = {path: self.frames[path] for path in paths if path in self.frames}
        files = [*paths, *(file for pair in frames.values() for file in pair.files)]
        return ImagePart(number, paths, {file: self.members[file] for file in files if file in self.members}, frames)

    @cached_property
    def text_parts(self) -> tuple[TextPart, ...]:
        """Parts of records, in store order."""
        groups = _groups(self.records, RECORDS_PER_PART)
        return tuple(TextPart(number, tuple(records)) for number, records in enumerate(groups))

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts; images first, since they take longest."""
        return (*self.image_parts, *self.text_parts)

    @property
    def pixels(self) -> SlotsShape:
        """Shape of `images/pixels`."""
        return self.processor.pixels(len(self.image_parts), self.images_per_part, self.compression)


def make_plan(recipe: Recipe, inputs: Inputs, tokenizer: Tokenizer) -> Plan:
    """The plan of preprocessing `inputs` as `recipe` says.

    Args:
        recipe: The recipe.
        inputs: The records that were read, and where their images are.
        tokenizer: The tokenizer that the recipe names.

    Returns:
        The plan; the same arguments give the same hash on every machine.
    """
    processor = processor_of(recipe)
    if inputs.frames and isinstance(processor, SizedProcessor):
        processor = replace(processor, video_max_pixels=recipe.data.video_max_pixels)
    images = tuple(dict.fromkeys(path for record in inputs.records for path in record.images))
    description = {
        "format": FORMAT,
        "version": processor.pixels(1, 1, recipe.data.compression).version,
        "records": {"sha256": inputs.sha256, "count": len(inputs.records)},
        "images": len(images),
        "processor": processor.describe(),
        "tokenizer": tokenizer.describe(),
        "template": str(recipe.data.template),
        "ignore_keys": sorted(set(recipe.data.ignore_keys)),
        "images_per_part": recipe.data.images_per_part,
        "compression": str(recipe.data.compression),
        **({"videos": hashlib.sha256("\n".join(inputs.frames).encode()).hexdigest()} if inputs.frames else {}),
    }
    return Plan(
        description,
        processor,
        str(recipe.data.template),
        inputs.records,
        images,
        recipe.data.images_per_part,
        recipe.data.compression,
        inputs.members,
        inputs.frames,
    )


def _groups(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
