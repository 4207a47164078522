"""What the model learns from: raw data for `preprocess`, finished stores for `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from megatron_deepstack.config.choices import Compression, DeepGrey, ImageResize, Orientation, Template, Unreadable
from megatron_deepstack.config.constraints import POSITIVE, SHARE, Matches, PathKind, Unit

_TRANSPARENCY: Final = Matches(
    "as_published|#[0-9a-fA-F]{6}", 'as_published, or a colour as "#rrggbb", such as "#ffffff" for white'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read: raw data for `preprocess`, the finished store for `train`."""

    records: tuple[Annotated[str, PathKind.PATTERN], ...] | None = None
    """For `preprocess`: LLaVA-style JSON or JSON-lines files (also .gz), or WebDataset tar shards; one or several."""
    images: Annotated[str, PathKind.LOCATION] | None = None
    """Folder that the records' image paths are relative to; tar shards bring their own images."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records, their turns and parts that `preprocess` passes over; any other key that nothing reads is an
    error. A placeholder of another medium, such as `<video>`, that is named here is plain text."""
    tokenizer: Annotated[str, PathKind.LOCAL] | None = None
    """SentencePiece model file, or a Hugging Face tokenizer: its tokenizer.json, or the folder that holds it."""
    template: Template = Template.V1
    """How a conversation is written as text: `plain` (captions alone), `v1` (Vicuna), `llama_3` or `qwen` (ChatML). It
    must be the one that the decoder was trained with."""
    store: Annotated[str, PathKind.LOCATION] | None = None
    """The zarr store that `preprocess` writes and `train` reads: a folder, or the URL of an object store."""
    stores: tuple[Annotated[str, PathKind.LOCATION], ...] | None = None
    """Several stores to train on, in place of `store`."""
    weights: tuple[Annotated[float, POSITIVE], ...] | None = None
    """Share of the samples drawn from each of `stores`, in any unit; if null, in proportion to their numbers of
    samples."""
    validation_store: Annotated[str, PathKind.LOCATION] | None = None
    """Held-out zarr store, for `train.validation_interval` and `generate`."""
    resize: ImageResize = ImageResize.PILLOW
    """Kernel that resizes images. `pillow` is bit-equal to the published preprocessing; `torch` rounds otherwise."""
    orientation: Orientation = Orientation.AS_STORED
    """Whether photos are turned as their EXIF tag says. The published preprocessing does not turn them."""
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    """Grey images of more than 8 bits: `as_published` cuts values off at 255 and flags the image, `scale` brings them
    to 8 bits: 0 to 65535 divided by 257, floats of 0 to 1 times 255, other values from the image's least to its
    greatest; an image whose values all lie within 0 to 255 stays as it is."""
    transparency: Annotated[str, _TRANSPARENCY] = "as_published"
    """Images that are not opaque: `as_published` drops the alpha channel and flags the image; a colour as "#rrggbb"
    (in quotes in a file, where YAML takes # for a comment) is what they are laid on."""
    compression: Compression = Compression.NONE
    """Codec of the views in the store. `zstd` takes about a quarter less space and reads slower."""
    max_image_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 178_956_970
    """Images with more pixels are quarantined before they are decoded. The default is the number
    above which Pillow refuses an image as a decompression bomb."""
    max_quarantined: Annotated[float, SHARE] = 0.05
    """Share of the images that may be quarantined before the job stops."""
    max_image_seconds: Annotated[float, POSITIVE, Unit("seconds")] = 60.0
    """An image that takes longer to read and decode is quarantined."""
    images_per_part: Annotated[int, POSITIVE, Unit("images")] = 64
    """Images of a part, which is the unit of work and of resuming: a killed job repeats at most the parts in work."""
    verify_checksums: bool = True
    """Check each view's crc32c when it is read."""
    cache_dir: Annotated[str, PathKind.LOCAL] | None = None
    """Folder for local copies of the shards of a store in an object store; a temporary folder if null."""
    cache_gib: Annotated[float, POSITIVE, Unit("GiB")] = 64.0
    """Most space that such copies take on a node; the least recently used ones go first."""
    unreadable: Unreadable = Unreadable.STOP
    """What happens to a sample whose views cannot be read: the run stops and names it, or it is left out of the loss
    and counted."""
