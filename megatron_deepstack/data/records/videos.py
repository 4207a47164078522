"""The videos that a record names: files of videos, or lists of files of their frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megatron_deepstack.data.records.keys import FaultError, check_keys
from megatron_deepstack.data.records.turns import Video, is_whole_text

VIDEO_KEYS: Final = ("video", "videos")
"""Keys of a record that name videos: one, or a list of them."""
_FPS_KEYS: Final = ("fps", "sample_fps")


def read_videos(item: Mapping[str, Any]) -> tuple[Video, ...]:
    """Return the videos of a record, in order.

    A video is the path of a file, a list of paths (its frames), or an object with either as `video` and with `fps`, the
    frames per second of such a list.

    Args:
        item: The record.

    Returns:
        The videos; none if the record names none.

    Raises:
        FaultError: A key holds something else, or both keys name videos.
    """
    named = [key for key in VIDEO_KEYS if key in item]
    if len(named) > 1:
        raise FaultError("names its videos as `video` and as `videos`; name them in one place")
    if not named:
        return ()
    value = item[named[0]]
    return tuple(read_video(one, f"`{named[0]}`") for one in (value if isinstance(value, list) else [value]))


def read_video(value: Any, where: str) -> Video:
    """Return one video.

    Args:
        value: The path of a file, a list of paths, or an object with either as `video`, such as a part of a message.
        where: Its place, for messages.

    Returns:
        The video.

    Raises:
        FaultError: It is something else, or has no frames.
    """
    fps: float | None = None
    if isinstance(value, dict):
        check_keys(value.keys(), ("type", "video", *_FPS_KEYS), where)
        given = [value[key] for key in _FPS_KEYS if key in value]
        if given and (isinstance(given[0], bool) or not isinstance(given[0], int | float) or given[0] <= 0):
            raise FaultError(f"{where} has {given[0]!r} frames per second; a positive number was expected")
        fps, value = (float(given[0]) if given else None), value.get("video")
    is_list = isinstance(value, list)
    files = value if isinstance(value, list) else [value]
    if not files:
        raise FaultError(f"{where} holds a video without frames: an empty list")
    wrong = [one for one in files if not isinstance(one, str) or not one or "\0" in one or not is_whole_text(one)]
    if wrong:
        raise FaultError(f"{where} holds {wrong[0]!r}; a path, or a list of paths of frames, was expected")
    return Video(tuple(one.removeprefix("file://") for one in files), is_list, fps)
