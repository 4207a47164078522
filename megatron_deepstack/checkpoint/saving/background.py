"""A rank's checkpoint work beside its training: tensors to host memory, files by the writer process.

The tensors are those the optimizer changes, and nothing else changes them. So they are copied while the next step's
forward and backward run, and the optimizer's next update waits for the copy: every tensor is saved as it was when the
save began. The memory is reused by every save.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_deepstack.checkpoint.saving.plan import RankPlan
from megatron_deepstack.checkpoint.saving.writer import FileTask, Reply, StagedTensor, WriteTask
from megatron_deepstack.platform.compute.host_memory import HostMemory, copies_behind_queued_work, lay_out

_START = "import sys; from megatron_deepstack.checkpoint.saving.writer import serve; serve(*map(int, sys.argv[1:]))"


class Work:
    """Something that runs in a thread of its own; `error` says what went wrong, once it is `done`."""

    def __init__(self, function: Callable[[], int]) -> None:
        self.done = threading.Event()
        self.error: str | None = None
        self.num_bytes = 0
        self._function = function
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        try:
            self.num_bytes = self._function()
        except Exception as error:
            self.error = str(error) or repr(error)
        finally:
            self.done.set()


class Background:
    """The writer process of this rank, and the memory it shares with it."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._pipe, theirs = Pipe()
        handles = (theirs.fileno(), self._memory.handle)
        modules = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, (os.getpid(), *handles))],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.staged = threading.Event()
        self.staged.set()
        self._end = weakref.finalize(self, _end, self._pipe, self._process, self._memory)

    def write(self, plan: RankPlan, folder: Path, rank: int, before: Callable[[], None]) -> Work:
        """Copy tensors to host memory, call `before`, and write the files. It returns at once; one write at a time.

        Room for the copies is made in the work's thread too, since page-locking it may take seconds. `staged` is set
        as soon as the tensors may change again.

        Args:
            plan: The files of this rank and their tensors, which must not change until `staged` is set.
            folder: The checkpoint's partial folder.
            rank: The global rank, for names and messages.
            before: Called in the work's thread after the copies and before the first byte is written. An error of it
                becomes the work's.

        Returns:
            The work, whose `done` is set when the files are written or `error` says why they are not.
        """
        tensors = [tensor for file in plan.files for _, tensor in file.tensors]
        offsets, num_bytes = lay_out(tensors)
        places = iter(offsets)
        files = [
            FileTask(
                name=file.name,
                objects=file.objects,
                tensors=[StagedTensor(item, t.dtype, tuple(t.shape), next(places)) for item, t in file.tensors],
            )
            for file in plan.files
        ]
        task = WriteTask(folder=str(folder), rank=rank, files=files, small_files=plan.small_files)
        self.staged.clear()
        copy = copies_behind_queued_work()

        def stage() -> None:
            self._memory.reserve(num_bytes)
            copy([(self._memory.view(o, t), t) for o, t in zip(offsets, tensors, strict=True)])

        return Work(lambda: self._stage_and_write(stage, before, task))

    def close(self) -> None:
        """End the process and give the memory back; a save in flight is lost."""
        self._end()

    def _stage_and_write(self, stage: Callable[[], None], before: Callable[[], None], task: WriteTask) -> int:
        try:
            stage()
        finally:
            self.staged.set()
        before()
        try:
            self._pipe.send(task)
            reply: Reply = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise OSError(f"its writer process ended with exit code {self._process.wait()}") from error
        if reply.error is not None:
            raise OSError(reply.error)
        return reply.num_bytes


def _end(pipe: Connection, process: subprocess.Popen[bytes], memory: HostMemory) -> None:
    process.kill()
    process.wait()
    pipe.close()
    memory.close()
