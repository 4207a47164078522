"""Videos of records as pairs of frames, before a job is planned: what each pair is called, where it is, and its time.

The header of each video is read once, in processes of their own, since decoders may crash on a file. After that a
video is nothing but images: each pair of frames is one, and the record's text has its time before its placeholder. A
video that cannot be used stays one image, which is quarantined with the reason, so that its samples are listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Final

from megatron_deepstack.data.images.source import FileAt, QuarantineError, read_image
from megatron_deepstack.data.images.video import (
    VideoLimits,
    image_size,
    pair_times,
    read_facts,
    require_pyav,
    sampled_frames,
    video_size,
)
from megatron_deepstack.data.records.record import Record
from megatron_deepstack.data.records.turns import VIDEO_BEGIN, VIDEO_END, VIDEO_TOKEN, Video
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN

_MOST_PROCESSES: Final = 16
_PLACEHOLDERS: Final = re.compile(f"({re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)})")


@dataclass(frozen=True, slots=True)
class FramePair:
    """A pair of frames as a job knows it."""

    files: tuple[str, ...]
    """Paths as those of images: the video, or two pictures."""
    numbers: tuple[int, int] | None
    size: tuple[int, int]
    fault: str | None = None
    """Why the video cannot be used, if it cannot."""


@dataclass(frozen=True, slots=True)
class VideoRules:
    """How videos are read."""

    limits: VideoLimits
    multiple: int
    """Pixels of which the sides of a view are multiples."""
    max_image_pixels: int


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What becomes of a video: names, times in seconds and places of its pairs."""

    names: tuple[str, ...]
    times: tuple[float, ...]
    pairs: tuple[FramePair, ...]


def with_frames(
    records: Sequence[Record], rules: VideoRules, file_at: Callable[[str], FileAt]
) -> tuple[tuple[Record, ...], dict[str, FramePair]]:
    """Write the videos of records as images.

    Args:
        records: The records of a job.
        rules: How videos are read.
        file_at: Where a file of a record is, from its path.

    Returns:
        The records, and the pairs of frames by the names under which they are images now.

    Raises:
        DataError: PyAV is not installed, or the machine fails to read a video.
    """
    videos = list(dict.fromkeys(video for record in records for video in record.videos))
    if not videos:
        return tuple(records), {}
    if not all(video.is_list for video in videos):
        require_pyav()
    tasks = [(video, rules, tuple(map(file_at, video.files))) for video in videos]
    found = dict(zip(videos, _examined(tasks), strict=True))
    frames = {name: pair for one in found.values() for name, pair in zip(one.names, one.pairs, strict=True)}
    return tuple(_expanded(record, found) if record.videos else record for record in records), frames


_Task = tuple[Video, VideoRules, tuple[FileAt, ...]]


def _examined(tasks: Sequence[_Task]) -> Iterator[_Pairs]:
    """Examine videos in processes; a video that kills its process is examined once more by itself, and then refused."""
    count = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), len(tasks))
    done = 0
    while done < len(tasks):
        try:
            with ProcessPoolExecutor(count, get_context("spawn")) as pool:
                for pairs in pool.map(_examine, tasks[done:]):
                    yield pairs
                    done += 1
        except BrokenProcessPool:
            if count == 1:
                video = tasks[done][0]
                yield _refused(video, "the process that reads it dies")
                done += 1
            count = 1


def _examine(task: _Task) -> _Pairs:
    """What becomes of one video; runs in a process of its own."""
    video, rules, files = task
    try:
        if video.is_list:
            return _listed(video, rules, files)
        facts = read_facts(read_image(files[0], rules.max_image_pixels))
        frames = sampled_frames(facts.num_frames, facts.fps, rules.limits)
        count = len(dict.fromkeys(frames))
        size = video_size(max(count, 2), facts.width, facts.height, rules.multiple, rules.limits)
    except QuarantineError as error:
        return _refused(video, str(error))
    (path,), (width, height) = video.files, size
    pairs = list(zip(frames[::2], frames[1::2], strict=True))
    names = tuple(f"{path}#{first}-{second}@{width}x{height}" for first, second in pairs)
    return _Pairs(names, tuple(pair_times(frames, facts.fps)), tuple(FramePair((path,), pair, size) for pair in pairs))


def _listed(video: Video, rules: VideoRules, files: tuple[FileAt, ...]) -> _Pairs:
    """A list of frames: all are taken, or as many as may be, at equal distances."""
    fps, most = video.fps or rules.limits.fps, rules.limits.max_frames
    frames = sampled_frames(len(files), fps, replace(rules.limits, fps=fps, max_frames=most))
    width, height = image_size(read_image(files[0], rules.max_image_pixels))
    size = video_size(max(len(dict.fromkeys(frames)), 2), width, height, rules.multiple, rules.limits)
    pairs = [(video.files[a], video.files[b]) for a, b in zip(frames[::2], frames[1::2], strict=True)]
    names = tuple(f"{first}+{second}@{size[0]}x{size[1]}" for first, second in pairs)
    return _Pairs(names, tuple(pair_times(frames, fps)), tuple(FramePair(pair, None, size) for pair in pairs))


def _refused(video: Video, reason: str) -> _Pairs:
    name = video.files[0] if not video.is_list else f"{video.files[0]}+{video.files[-1]}"
    return _Pairs((f"{name}#video",), (0.0,), (FramePair(video.files[:1], None, (0, 0), reason),))


def _expanded(record: Record, found: dict[Video, _Pairs]) -> Record:
    """A record whose videos are images, each with its time before it."""
    images, videos = iter(record.images), iter(record.videos)
    used: list[str] = []

    def write(match: re.Match[str]) -> str:
        if match.group() == IMAGE_TOKEN:
            used.append(next(images))
            return IMAGE_TOKEN
        pairs = found[next(videos)]
        used.extend(pairs.names)
        return VIDEO_BEGIN + "".join(f"<{time:.1f} seconds>{IMAGE_TOKEN}" for time in pairs.times) + VIDEO_END

    turns = tuple(replace(turn, text=_PLACEHOLDERS.sub(write, turn.text)) for turn in record.turns)
    return Record(record.id, tuple(used), turns)
