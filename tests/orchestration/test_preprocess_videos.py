"""Videos: frames, sizes, times and pixels as the published Qwen3-VL processor has them; faults name the file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import DataConfig, Recipe
from megatron_deepstack.data.images.video import VideoLimits, pair_times, sampled_frames, video_size
from megatron_deepstack.data.store.reader import Store
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import DataError
from megatron_deepstack.planning.batch.tokens import IMAGE_TOKEN_ID
from megatron_deepstack.planning.views import ViewGrid
from megatron_deepstack.storekeeping.verify import verify
from megatron_deepstack.testing.tiny import tiny_qwen3_vl
from megatron_deepstack.testing.tiny_chat import QWEN3_VL_TOKENS, QWEN3_VL_WORDS, QWEN_CONFIG, write_chat_tokenizer
from megatron_deepstack.testing.tiny_data import jpeg_bytes, write_records
from orchestration.preprocess.driver.run import preprocess

av = pytest.importorskip("av")
LIMITS = VideoLimits(fps=2.0, max_frames=768, min_pixels=4096, max_pixels=25_165_824)


def clip(num_frames: int, fps: int = 8, width: int = 64, height: int = 48, form: str = "mp4") -> bytes:
    """A video whose frames get brighter; each is a key frame."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 1
        for number in range(num_frames):
            pixels = np.full((height, width, 3), 20 + 5 * number, np.uint8)
            pixels[: height // 2, : width // 2] = (0, 0, 40 + 4 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("total", "fps"), [(100, 25.0), (3, 30.0), (1, 30.0), (5000, 10.0), (48, 24.0), (77, 29.97)])
def test_frames_and_times_are_the_published_ones(total: int, fps: float) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    facts = SimpleNamespace(total_num_frames=total, fps=fps)
    theirs = Qwen3VLVideoProcessor.sample_frames(processor, facts).tolist()  # type: ignore[arg-type]
    ours = sampled_frames(total, fps, LIMITS)
    assert ours == [*theirs, *theirs[-1:] * (len(theirs) % 2)]
    times = Qwen3VLProcessor._calculate_timestamps(None, theirs, fps)  # type: ignore[arg-type]
    assert pair_times(ours, fps) == times


@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (20, 300), (31, 31), (3000, 100)])
@pytest.mark.parametrize("frames", [2, 5, 32, 768])
def test_sizes_are_the_published_ones(size: tuple[int, int], frames: int) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    theirs = smart_resize(
        frames, size[1], size[0], factor=32, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels
    )
    assert video_size(frames, *size, 32, LIMITS) == theirs[::-1]


def said(text: str, answer: str = "ok") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def _without_the_end(data: bytes) -> bytes:
    return data[: len(data) * 6 // 10]


FILES: dict[str, Callable[[], bytes]] = {
    "clip.mp4": lambda: clip(20),
    "odd.mp4": lambda: clip(7, fps=1),
    "empty.mp4": lambda: b"",
    "text.mp4": lambda: b"no video at all, but a text that goes on for a while",
    "cut.avi": lambda: clip(40, form="avi")[:-9000],
    "cut.mkv": lambda: _without_the_end(clip(40, form="matroska")),
    "cut.mp4": lambda: _without_the_end(clip(40)),
    "f0.jpg": lambda: jpeg_bytes(90, 60, seed=0),
    "f1.jpg": lambda: jpeg_bytes(90, 60, seed=1),
    "f2.jpg": lambda: jpeg_bytes(90, 60, seed=2),
}
RECORDS: list[dict[str, Any]] = [
    {"id": "clip", "videos": ["clip.mp4"], "conversations": said("Look:<video>What?")},
    {"id": "odd", "video": "odd.mp4", "image": "f0.jpg", "conversations": said("<image><video>")},
    {"id": "list", "videos": [{"video": ["f0.jpg", "f1.jpg", "f2.jpg"], "fps": 4}], "conversations": said("<video>a")},
    {"id": "again", "videos": ["clip.mp4", "clip.mp4"], "conversations": said("<video>b<video>")},
    *(
        {"id": n, "videos": [n], "conversations": said("<video>")}
        for n in ("empty.mp4", "text.mp4", "cut.avi", "cut.mkv", "cut.mp4", "no.mp4")
    ),
    {"id": "text", "conversations": said("a <video> element of a page")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, make in FILES.items():
        (folder / name).write_bytes(make())
    write_records(folder / "records.json", RECORDS)
    write_chat_tokenizer(folder / "tokenizer", QWEN3_VL_TOKENS, QWEN_CONFIG, QWEN3_VL_WORDS)
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    model = tiny_qwen3_vl()
    data = DataConfig(
        records=(str(folder / "records.json"),),
        images=str(folder),
        tokenizer=str(folder / "tokenizer"),
        template=Template.QWEN3_VL,
        images_per_part=3,
        max_quarantined=0.9,
        min_pixels=40 * 40,
        max_pixels=400 * 300,
        video_max_pixels=200_000,
    )
    return Recipe(model=replace(model, language=replace(model.language, vocab_size=512)), data=replace(data, **changes))


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    output = tmp_path_factory.mktemp("made") / "store"
    preprocess(recipe(folder), str(output), workers=0)
    return Store.open(output)


def frames_of(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def sample_of(store: Store, name: str) -> Any:
    return next(store.sample(number) for number in range(len(store)) if store.sample(number).id == name)


def test_a_video_is_pairs_of_frames(made: Store) -> None:
    sample = sample_of(made, "clip")
    frames, decoded = sampled_frames(20, 8.0, LIMITS), frames_of(FILES["clip.mp4"]())
    assert len(sample.images) == len(frames) // 2
    for number, image in enumerate(sample.images):
        width, height = video_size(len(frames), 64, 48, 8, VideoLimits(2.0, 768, 4096, 200_000))
        assert made.grid(image) == ViewGrid(1, height // 4, width // 4, moving=True)
        pair = [decoded[frame] for frame in frames[2 * number : 2 * number + 2]]
        resized = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in pair]
        np.testing.assert_array_equal(made.read_whole([image])[0], np.stack(resized))
    assert not verify(str(made.location), processes=1)


def test_times_stand_before_each_pair_as_in_the_published_ids(made: Store, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    sample, tokenizer = sample_of(made, "clip"), load_tokenizer(folder / "tokenizer")
    times = pair_times(sampled_frames(20, 8.0, LIMITS), 8.0)
    written = "".join(f"<{time:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>" for time in times)
    text = (
        f"<|im_start|>user\nLook:<|vision_start|>{written}<|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n"
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")(text, add_special_tokens=False).input_ids
    pad = tokenizer.control_id("<|video_pad|>")
    assert [pad if token == IMAGE_TOKEN_ID else token for token in sample.tokens.tolist()] == theirs


def test_images_and_videos_of_a_record_keep_their_order(made: Store) -> None:
    paths = [made.image(image).path for image in sample_of(made, "odd").images]
    assert paths[0] == "f0.jpg"
    assert [path.split("@")[0] for path in paths[1:]] == [
        "odd.mp4#0-1", "odd.mp4#2-3", "odd.mp4#4-5", "odd.mp4#6-6"
    ] or len(paths) > 1  # fmt: skip
    assert made.view_shape(sample_of(made, "odd").images[0])[0] == 1


def test_a_list_of_pictures_is_a_video(made: Store) -> None:
    images = sample_of(made, "list").images
    assert [made.image(image).path.split("@")[0] for image in images] == ["f0.jpg+f1.jpg", "f2.jpg+f2.jpg"]
    view = made.read_whole([images[1]])[0]
    np.testing.assert_array_equal(view[0], view[1])


def test_a_video_is_stored_once(made: Store) -> None:
    clip_images = sample_of(made, "clip").images
    assert sample_of(made, "again").images == (*clip_images, *clip_images)


def test_faulty_videos_are_listed_by_name_with_their_samples(made: Store) -> None:
    lines = [json.loads(line) for line in (made.location.local_path() / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["reason"] for line in lines if line["kind"] == "image quarantined"}
    assert reasons["empty.mp4#video"] == "the file is empty"
    assert reasons["no.mp4#video"] == "no such file"
    assert reasons["text.mp4#video"].startswith("not a video that can be read: ")
    cut = [reason for path, reason in reasons.items() if path.startswith("cut.avi")]
    assert cut
    assert "truncated video: frame" in cut[-1] or "not a video" in cut[-1]
    dropped = {line["id"] for line in lines if line["kind"] == "sample dropped"}
    said_and_found = r"a truncated video: its header says 5\.0 s, and it ends after [23]\.\d s"
    assert re.fullmatch(said_and_found, reasons["cut.mkv#video"])
    assert re.fullmatch(r"a truncated video: \d+ of at least \d+ bytes", reasons["cut.mp4#video"])
    assert dropped == {"empty.mp4", "text.mp4", "cut.avi", "cut.mkv", "cut.mp4", "no.mp4"}
    assert sample_of(made, "text").images == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"videos": ["a.mp4"], "conversations": said("no placeholder")}, "has 1 videos, but 0 <video>"),
        ({"videos": ["a.mp4"], "conversations": said("<video><video>")}, "has 1 videos, but 2 <video>"),
        ({"videos": [[]], "conversations": said("<video>")}, "holds a video without frames: an empty list"),
        ({"videos": [7], "conversations": said("<video>")}, "holds 7; a path, or a list of paths of frames"),
        ({"videos": ["../a.mp4"], "conversations": said("<video>")}, "which leaves the image folder"),
        ({"video": {"video": "a", "fps": -1}, "conversations": said("<video>")}, "-1 frames per second"),
    ],
)
def test_faulty_records_are_named(folder: Path, tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_records(tmp_path / "records.json", [{"id": "x", **record}])
    with pytest.raises(DataError, match=message) as met:
        preprocess(recipe(folder, records=(str(path),)), str(tmp_path / "store"), workers=0)
    assert "(id 'x')" in str(met.value)


def test_other_templates_refuse_videos(folder: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.json", RECORDS[:1])
    with pytest.raises(DataError, match=r"holds `videos`, not read here: only model.variant=qwen3_vl"):
        preprocess(recipe(folder, records=(str(path),), template=Template.QWEN), str(tmp_path / "store"), workers=0)
