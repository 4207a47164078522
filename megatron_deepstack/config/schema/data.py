"""The section `data`: raw data for `preprocess`, and finished stores for `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from megatron_deepstack.config.choices import Compression, DeepGrey, ImageResize, Orientation, Template, Unreadable
from megatron_deepstack.config.constraints import NOT_NEGATIVE, POSITIVE, SHARE, Matches, PathKind, Unit

_TRANSPARENCY: Final = Matches(
    "as_published|#[0-9a-fA-F]{6}", 'as_published, or a colour as "#rrggbb", such as "#ffffff" for white'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data: raw records and images that `preprocess` reads, and the finished store that `train` reads."""

    records: tuple[Annotated[str, PathKind.PATTERN], ...] | None = None
    """One or several files for `preprocess`: LLaVA-style JSON or JSON lines (also .gz), or WebDataset tar shards."""
    images: Annotated[str, PathKind.LOCATION] | None = None
    """Folder to which the image paths in the records are relative; tar shards contain their images."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records, of their turns and of the parts of a turn that `preprocess` ignores; any other key that it does
    not know is an error. A placeholder of another medium, such as `<video>`, that is named here is read as plain
    text."""
    tokenizer: Annotated[str, PathKind.LOCAL] | None = None
    """SentencePiece model file, or a Hugging Face tokenizer: a tokenizer.json, or the folder that holds it."""
    template: Template = Template.V1
    """How a conversation is written as text: `plain` (only captions), `v1` (Vicuna), `llama_3`, `qwen` (ChatML),
    `qwen3_vl` (ChatML with tools, and with images where they stand, between control tokens) or `granite_4`. It must be
    the template that the decoder was trained with."""
    store: Annotated[str, PathKind.LOCATION] | None = None
    """The zarr store that `preprocess` writes and `train` reads: a folder, or the URL of an object store."""
    stores: tuple[Annotated[str, PathKind.LOCATION], ...] | None = None
    """Several stores to train on, in place of `store`."""
    weights: tuple[Annotated[float, POSITIVE], ...] | None = None
    """Share of the samples drawn from each of `stores`, in any unit; if null, in proportion to their numbers of
    samples."""
    validation_store: Annotated[str, PathKind.LOCATION] | None = None
    """Zarr store of held-out samples, for `train.validation_interval` and `generate`."""
    expected_text_tokens: Annotated[int, POSITIVE, Unit("tokens")] = 260
    """Mean number of text tokens of a sample, from which `plan` estimates memory and time where there is no store. The
    default is about that of LLaVA's 665K instructions."""
    expected_images: Annotated[float, NOT_NEGATIVE] = 1.0
    """Mean number of images of a sample, for the same estimate."""
    expected_image_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 307_200
    """Mean area of an image, for the same estimate of models that look at an image at its own resolution (`min_pixels`
    and `max_pixels` bound the area of its view) or cut it into padded tiles. The default is 640 x 480."""
    resize: ImageResize = ImageResize.PILLOW
    """Kernel that resizes images. `pillow` gives exactly the pixels of the published preprocessing; `torch` rounds
    differently."""
    min_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 65_536
    """Smallest area of the view of an image, for models that look at an image at its own resolution (`qwen3_vl`);
    smaller images are enlarged. Both limits are Qwen3-VL's own."""
    max_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 16_777_216
    """Largest area of such a view; larger images are reduced. Each 1024 pixels (32 x 32) become one visual token, so
    this bounds the tokens of an image: 16,384 by default."""
    video_fps: Annotated[float, POSITIVE, Unit("frames a second")] = 2.0
    """Frames a second that are taken of a video, at equal distances; at least 4, and an even number. Only `qwen3_vl`
    takes videos. These values are Qwen3-VL's own."""
    video_max_frames: Annotated[int, POSITIVE, Unit("frames")] = 768
    """Most frames that are taken of a video."""
    video_min_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 4_096
    """Fewest pixels of all frames of a video together; smaller frames are enlarged."""
    video_max_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 25_165_824
    """Most pixels of all frames of a video together; larger frames are reduced. Two frames of 1024 pixels (32 x 32)
    become one visual token, so this bounds the tokens of a video: 12,288 by default."""
    orientation: Orientation = Orientation.AS_STORED
    """Whether photos are turned as their EXIF tag says: `exif` turns them, `as_stored` does not, as published."""
    deep_grey: DeepGrey = DeepGrey.AS_PUBLISHED
    """How grey images of more than 8 bits are read. `as_published` cuts values off at 255 and flags the image. `scale`
    brings them to 8 bits: values of 0 to 65535 are divided by 257, floats of 0 to 1 are multiplied by 255, and other
    values are stretched from the smallest to the largest of the image. An image whose values are all within 0 to 255
    is not changed."""
    transparency: Annotated[str, _TRANSPARENCY] = "as_published"
    """How images that are not opaque are read. `as_published` drops the alpha channel and flags the image. A colour
    such as "#ffffff" becomes their background; write it in quotes in a file, since # begins a comment in YAML."""
    compression: Compression = Compression.NONE
    """Codec of the views in the store. `zstd` takes about a quarter less space and is slower to read."""
    max_image_pixels: Annotated[int, POSITIVE, Unit("pixels")] = 178_956_970
    """Images with more pixels are quarantined before they are decoded. The default is the number above which Pillow
    refuses an image as a decompression bomb."""
    max_quarantined: Annotated[float, SHARE] = 0.05
    """Share of the images that may be quarantined before the job stops."""
    max_image_seconds: Annotated[float, POSITIVE, Unit("seconds")] = 60.0
    """An image that takes longer to read and decode is quarantined."""
    images_per_part: Annotated[int, POSITIVE, Unit("images")] = 64
    """Images in a part. A worker handles one part at a time, and a job that was killed repeats only the parts that it
    had not finished."""
    verify_checksums: bool = True
    """Check each view's crc32c when it is read."""
    cache_dir: Annotated[str, PathKind.LOCAL] | None = None
    """Folder for local copies of the shards of a store in an object store; a temporary folder if null."""
    cache_gib: Annotated[float, POSITIVE, Unit("GiB")] = 64.0
    """Largest space that such copies take on a node; the least recently used ones are removed first."""
    unreadable: Unreadable = Unreadable.STOP
    """What happens when the views of a sample cannot be read: `stop` ends the run and names the sample, `skip` leaves
    the sample out of the loss and counts it."""
