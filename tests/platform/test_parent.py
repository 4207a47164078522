"""A process dies with its parent, also where the parent is gone before the process can ask the kernel for it."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil

_CHILD = (
    "import sys; from megatron_deepstack.platform.processes.parent import die_with_parent; "
    "sys.stdin.readline(); die_with_parent(int(sys.argv[1])); print('alive', flush=True); sys.stdin.readline()"
)


def child(parent: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_parent_that_lives() -> None:
    process = child(psutil.Process().pid)
    out, _ = process.communicate("go\n\n")
    assert (out, process.returncode) == ("alive\n", 0)


def test_a_parent_that_died_during_the_imports() -> None:
    """The id of a process that is not the parent any more."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    process = child(gone.pid)
    out, _ = process.communicate("go\n\n")
    assert (out, process.returncode) == ("", -signal.SIGKILL)


def test_a_parent_that_is_killed_later() -> None:
    code = f"import subprocess, sys, os\np = subprocess.Popen([sys.executable, '-c', {_CHILD!r}, str(os.getpid())], "
    code += "stdin=sys.stdin)\nprint(p.pid, flush=True)\np.wait()\n"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    parent.stdin.write("go\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "alive\n"
    parent.kill()
    process.wait(200)
    parent.communicate()
