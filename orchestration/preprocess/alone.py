"""One image decoded in a process of its own, so that a decoder that crashes takes nothing with it.

This costs a second an image, and is only done for parts over which workers have died. The process reads its task from
stdin and answers on stdout, both pickled, and inherits nothing but the import path.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from megatron_deepstack.data.images import QuarantineError
from megatron_deepstack.data.processor import ProcessedImage, Processor

_CODE: Final = "from orchestration.preprocess.alone import serve; serve()"


@dataclass(frozen=True, slots=True)
class _Task:
    """An image file's bytes, and what is to be made of them."""

    processor: Processor
    data: bytes


def process_alone(processor: Processor, data: bytes, seconds: float) -> ProcessedImage:
    """`processor.process(data)` in a process of its own; raises QuarantineError, also if that process dies or hangs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _CODE]
    task = pickle.dumps(_Task(processor, data))
    try:
        ended = subprocess.run(command, input=task, env=environment, capture_output=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise QuarantineError(f"not decoded within {seconds:g} s, in a process of its own") from error
    if ended.returncode != 0:
        raise QuarantineError(f"kills its decoder: {_ending(ended.returncode)}")
    answer: ProcessedImage | QuarantineError = pickle.loads(ended.stdout)
    if isinstance(answer, QuarantineError):
        raise answer
    return answer


def serve() -> None:
    """The process: one task in, its result or QuarantineError out."""
    task: _Task = pickle.load(sys.stdin.buffer)
    answer: ProcessedImage | QuarantineError
    try:
        answer = task.processor.process(task.data)
    except QuarantineError as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
