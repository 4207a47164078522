"""The decoder process may die, hang, or be slow: the image is named, the others are not touched."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_deepstack.config.schema import DataConfig
from megatron_deepstack.data.images import decoder as decoder_module
from megatron_deepstack.data.images.decoder import Decoder, SharedImage, shared_decoder
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.data.images.source import ImageAt, QuarantineError
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.store.codec import checksums
from megatron_deepstack.errors import DataError
from megatron_deepstack.testing.tiny_data import tiny_recipe, write_photos

PROCESSOR = Processor.of(tiny_recipe())


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageAt]:
    return [Location(str(tmp_path / name)) for name in write_photos(tmp_path, 8)]


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(PROCESSOR, 30.0)
    yield made
    made.close()


def check(image: SharedImage | QuarantineError, at: ImageAt) -> None:
    assert isinstance(image, SharedImage)
    assert isinstance(at, Location)
    views = PROCESSOR.process(at.read_bytes()).slots
    np.testing.assert_array_equal(image.slots, views)
    assert image.crc32c == checksums(views)


def test_the_same_views_as_in_this_process(decoder: Decoder, photos: list[ImageAt]) -> None:
    for _ in range(2):
        for image, at in zip(decoder.decode(photos), photos, strict=True):
            check(image, at)
    assert list(decoder.decode([])) == []


def test_a_process_that_dies_between_images_costs_none(decoder: Decoder, photos: list[ImageAt]) -> None:
    for number, image in enumerate(decoder.decode([*photos[:3], Location("/none.jpg"), *photos[3:]])):
        if number == 3:
            assert isinstance(image, QuarantineError)
            continue
        check(image, photos[number - (number > 3)])
        if number == 5:
            assert decoder.process_id is not None
            os.kill(decoder.process_id, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_process_changes_nothing(decoder: Decoder, photos: list[ImageAt], how: signal.Signals) -> None:
    seen = set()
    for number, (image, at) in enumerate(zip(decoder.decode(photos), photos, strict=True)):
        check(image, at)
        assert decoder.process_id is not None
        seen.add(decoder.process_id)
        if number in (0, 4):
            os.kill(decoder.process_id, how)
    assert len(seen) == 3, "the fault did not fire"


def test_an_image_that_kills_the_process_is_quarantined(
    decoder: Decoder, photos: list[ImageAt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is replaced by one that dies over a certain image, as a decoder with a fault does."""
    code = "from megatron_deepstack.data.images import decoder_process as d\nimport os\nread = d.read_image\n"
    code += "d.read_image = lambda at, n: os.abort() if at.name == 'photo003.jpg' else read(at, n)\nd.main()"
    monkeypatch.setattr(decoder_module, "_CODE", code)
    outcomes = []
    for image, at in zip(decoder.decode(photos), photos, strict=True):
        if not isinstance(image, QuarantineError):
            check(image, at)
        outcomes.append(str(image) if isinstance(image, QuarantineError) else "")
    assert outcomes == ["", "", "", "the process that decodes it dies (SIGABRT), twice", "", "", "", ""]


def test_an_image_that_hangs_the_process_is_quarantined(photos: list[ImageAt], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal, the process hears nothing any more, as one that is stuck in C code."""
    code = "from megatron_deepstack.data.images import decoder_process as d\nimport os, signal\nread = d.read_image\n"
    code += "d.read_image = lambda at, n: os.kill(os.getpid(), signal.SIGSTOP) if '1.' in at.name else read(at, n)\n"
    monkeypatch.setattr(decoder_module, "_CODE", code + "d.main()")
    decoder = Decoder(PROCESSOR, 1.5)
    reasons = [str(image) for image in decoder.decode(photos[:3]) if isinstance(image, QuarantineError)]
    assert reasons == ["takes longer than data.max_image_seconds (1.5 s), twice"]
    decoder.close()


def test_a_list_that_is_left_in_the_middle(decoder: Decoder, photos: list[ImageAt]) -> None:
    images = decoder.decode(photos)
    next(images)
    images.close()
    for image, at in zip(decoder.decode(photos[3:]), photos[3:], strict=True):
        check(image, at)


def test_a_machine_that_cannot_read_stops_the_job(
    decoder: Decoder, photos: list[ImageAt], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from megatron_deepstack.data.images import decoder_process as d, source as s\n"
    code += "def broken(path): raise OSError(5, 'Input/output error')\ns.os.stat = broken\nd.main()"
    monkeypatch.setattr(decoder_module, "_CODE", code)
    with pytest.raises(DataError, match=r"photo000.jpg: reading failed: Input/output error. This is the machine's"):
        next(decoder.decode(photos))


def test_a_process_that_does_not_start_says_why(photos: list[ImageAt], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_CODE", "import no_such_module")
    with pytest.raises(DataError, match="does not start: ModuleNotFoundError: No module named 'no_such_module'"):
        next(Decoder(PROCESSOR, 30.0).decode(photos))


def test_a_machine_without_room_for_the_process_is_named(
    photos: list[ImageAt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(decoder_module.subprocess, "Popen", fail)
    with pytest.raises(DataError, match=r"decodes images does not start: Cannot allocate memory. This is the machine"):
        next(Decoder(PROCESSOR, 30.0).decode(photos))


def test_a_deadline_longer_than_any_wait(photos: list[ImageAt]) -> None:
    patient = Decoder(PROCESSOR, 1e12)
    check(next(patient.decode(photos)), photos[0])
    patient.close()


DRIVER = """
import os, sys, json
sys.path[:0] = json.loads(sys.argv[1])
from megatron_deepstack.data.images.decoder import Decoder
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.images.processor import Processor
from megatron_deepstack.testing.tiny_data import tiny_recipe
decoder = Decoder(Processor.of(tiny_recipe()), 30.0)
images = decoder.decode([Location(path) for path in sys.argv[2:]])
next(images)
print(decoder.process_id, flush=True)
sys.stdin.read()
"""


def test_the_process_goes_with_its_parent(photos: list[ImageAt]) -> None:
    """Also where the parent is killed and cannot say goodbye."""
    command = [sys.executable, "-c", DRIVER, json.dumps(sys.path), *map(str, photos[:2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        watch = os.pidfd_open(child)
        driver.kill()
    end = select.poll()
    end.register(watch, select.POLLIN)
    ready = end.poll(200_000)
    os.close(watch)
    assert ready, "the decoder outlives its driver"


def test_one_decoder_serves_all_parts_alike() -> None:
    assert shared_decoder(PROCESSOR, 30.0) is shared_decoder(PROCESSOR, 30.0)
    assert shared_decoder(PROCESSOR, 31.0) is not shared_decoder(PROCESSOR, 30.0)


def test_bombs_are_refused_inside(photos: list[ImageAt]) -> None:
    strict = Decoder(Processor.of(tiny_recipe(data=DataConfig(max_image_pixels=2000))), 30.0)
    reasons = [image for image in strict.decode(photos) if isinstance(image, QuarantineError)]
    strict.close()
    assert len(reasons) == 6
    assert "more than data.max_image_pixels allows (2000)" in str(reasons[0])
