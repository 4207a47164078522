"""Videos as pairs of frames: which frames are taken, at what time and in what size, and their pixels.

All of it follows the published Qwen3-VL processor: frames at equal distances, a limited number of them, two of them a
view, one size for all, from a limit on the pixels of the whole video. Files are decoded by PyAV, whose wheels bring
FFmpeg along (torchcodec wants it installed, and another build for each release of torch). PyAV is an extra.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from megatron_deepstack.data.images.source import QuarantineError
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.views import MAX_ASPECT_RATIO

MIN_FRAMES: Final = 4
"""Fewest frames that are taken of a video that has them, as published."""
PAIR: Final = 2
"""Frames of a view."""
SLACK_SECONDS: Final = 1.0
"""How much shorter than its header says a video may be: programs round, and count what follows the last frame."""
_TICKS: Final = 1_000_000
"""FFmpeg's units of a file's length in a second."""
_BOX_HEADER: Final = 8
_BOXES_OF_FRAMES: Final = (b"mdat", b"moof", b"moov")


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What the header of a video says."""

    num_frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """How many frames are taken, and how large they may be."""

    fps: float
    max_frames: int
    min_pixels: int
    max_pixels: int


def require_pyav() -> Any:
    """Import PyAV. Raises DataError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            "reading video files needs PyAV: pip install 'megatron-deepstack[video]' on every node, or give each video "
            "as a list of image files"
        ) from error
    av.logging.set_level(av.logging.PANIC)
    return av


def read_facts(data: bytes) -> VideoFacts:
    """Read the header of a video file.

    Args:
        data: The file's bytes.

    Returns:
        Number of frames, frames per second and size.

    Raises:
        QuarantineError: It is no video, or has no frames.
        DataError: PyAV is not installed.
    """
    av = require_pyav()
    _require_whole_boxes(data)
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise QuarantineError("a video without frames: it has no picture stream")
            stream = container.streams.video[0]
            count = stream.frames or _counted_frames(container, stream)
            fps = float(stream.average_rate or 0)
            width, height = stream.codec_context.width, stream.codec_context.height
    except av.FFmpegError as error:
        raise QuarantineError(f"not a video that can be read: {error.strerror or error}") from error
    if count < 1 or fps <= 0 or width < 1 or height < 1:
        raise QuarantineError(f"a video without frames: {count} frames of {width} x {height} pixels, {fps:g} a second")
    return VideoFacts(count, fps, width, height)


def _counted_frames(container: Any, stream: Any) -> int:
    """Count the frames of a file whose header has no number. Raises QuarantineError if the file ends before its time.

    Matroska and WebM say how long the longest of their streams is.
    """
    count, end = 0, 0.0
    for packet in container.demux():
        if packet.size and packet.dts is not None:
            count += packet.stream is stream
            end = max(end, float((packet.dts + (packet.duration or 0)) * packet.time_base))
    length = ((container.duration or 0) + max(container.start_time or 0, 0)) / _TICKS
    if count and end < length - SLACK_SECONDS:
        raise QuarantineError(f"a truncated video: its header says {length:.1f} s, and it ends after {end:.1f} s")
    return count


def _require_whole_boxes(data: bytes) -> None:
    """Raise QuarantineError if an MP4 or QuickTime file is cut off: it consists of boxes, each with its size.

    FFmpeg silently leaves out the rest of a fragmented file.
    """
    at = 0
    while data[4:8] == b"ftyp" and at + _BOX_HEADER <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:  # the size follows the name, in eight bytes
            size = int.from_bytes(data[at + _BOX_HEADER : at + 2 * _BOX_HEADER], "big")
        if size < _BOX_HEADER:  # 0: up to the end of the file; anything else is left to the decoder
            return
        name, at = data[at + 4 : at + _BOX_HEADER], at + size
        if at > len(data) and name in _BOXES_OF_FRAMES:
            raise QuarantineError(f"a truncated video: {len(data)} of at least {at} bytes")


def sampled_frames(num_frames: int, fps: float, limits: VideoLimits) -> list[int]:
    """Choose the frames that are taken, at equal distances from the first to the last.

    Args:
        num_frames: Frames of the video.
        fps: Its frames per second.
        limits: How many frames a second are wanted, and how many at most.

    Returns:
        Numbers of frames, ascending; the last one twice if there would be an odd number.
    """
    wanted = int(num_frames / fps * limits.fps)
    count = min(max(wanted, MIN_FRAMES), limits.max_frames, num_frames)
    chosen = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
    return [*chosen, *chosen[-1:] * (len(chosen) % PAIR)]


def pair_times(frames: Sequence[int], fps: float) -> list[float]:
    """Return the time of each pair of frames: the middle between its two.

    Args:
        frames: Numbers of frames, two for each pair.
        fps: Frames per second of the video.

    Returns:
        Seconds from the start of the video.
    """
    return [(first / fps + second / fps) / 2 for first, second in zip(frames[::2], frames[1::2], strict=True)]


def video_size(num_frames: int, width: int, height: int, multiple: int, limits: VideoLimits) -> tuple[int, int]:
    """Choose the size of all frames of a video, as published.

    Args:
        num_frames: Frames that are taken, before one is repeated.
        width: Width of the video in pixels.
        height: Its height.
        multiple: Pixels of which each side becomes a multiple.
        limits: The least and most pixels of all frames together.

    Returns:
        Width and height in pixels.

    Raises:
        QuarantineError: One side is more than 200 times the other.
    """
    if height < multiple or width < multiple:
        scale = max(multiple / height, multiple / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise QuarantineError(
            f"a video of {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other"
        )
    high, wide = (round(side / multiple) * multiple for side in (height, width))
    pixels = round(num_frames / PAIR) * PAIR * high * wide
    if pixels > limits.max_pixels:
        shrink = math.sqrt(num_frames * height * width / limits.max_pixels)
        high, wide = (max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (height, width))
    elif pixels < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (num_frames * height * width))
        high, wide = (math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return wide, high


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file, from its header. Raises QuarantineError if it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # damaged files make Pillow's parsers raise almost anything
        raise QuarantineError(f"a frame that is no image: {type(error).__name__}: {error}") from error


class _OpenVideo:
    """A video that is being decoded from front to back, so that the pairs of a part decode it once."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._container = require_pyav().open(io.BytesIO(data))
        self._frames = self._container.decode(video=0)
        self.number = -1
        self._pixels = np.empty((0, 0, 3), np.uint8)

    def frame(self, number: int) -> np.ndarray:
        """The frame of that number, not before the last one: uint8 (height, width, 3). Raises QuarantineError."""
        frame = None
        try:
            while self.number < number:
                frame = next(self._frames)
                self.number += 1
        except StopIteration:
            raise QuarantineError(
                f"a truncated video: frame {number} is missing, it ends after {self.number + 1}"
            ) from None
        except require_pyav().FFmpegError as error:
            raise QuarantineError(f"a damaged video: frame {number} cannot be decoded: {error.strerror}") from error
        if frame is not None:
            self._pixels = frame.to_ndarray(format="rgb24")
        return self._pixels


_LAST: Final[list[_OpenVideo]] = []
"""The video that was decoded last, if any; only the process that decodes images has one."""


def decode_frames(data: bytes, numbers: Sequence[int]) -> list[np.ndarray]:
    """Decode frames of a video file.

    Args:
        data: The file's bytes.
        numbers: Numbers of frames, ascending.

    Returns:
        For each uint8 (height, width, 3).

    Raises:
        QuarantineError: The file is damaged, or ends before.
    """
    if not (_LAST and _LAST[0].number <= numbers[0] and _LAST[0].data == data):
        _LAST.clear()
        read_facts(data)
        _LAST.append(_OpenVideo(data))
    try:
        return [_LAST[0].frame(number) for number in numbers]
    except QuarantineError:
        _LAST.clear()
        raise
