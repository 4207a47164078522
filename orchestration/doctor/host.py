"""What can be seen of this machine at once: versions, cores, memory, disks, limits, ports, locks.

Nothing heavy is imported here, and each function looks at one subject.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

from megatron_deepstack.platform.quantity import data_size
from orchestration.doctor.finding import Finding, State

_GB: Final = 10**9
_ENOUGH_SHARED: Final = _GB
"""Docker's default is 64 MB, in which neither NCCL nor Ray has room."""
_ENOUGH_DISK: Final = 10 * _GB
_ENOUGH_FILES: Final = 65536
_FEWEST_FILES: Final = 1024
_ENOUGH_MEMORY: Final = 4 * _GB


def look(folder: Path) -> Iterator[Finding]:
    """All of it; `folder` is where runs are going to lie."""
    yield _python()
    yield from _packages()
    yield _cores()
    yield _threads()
    yield _memory()
    yield _shared_memory()
    yield from _disks(folder)
    yield _locks(folder)
    yield _open_files()
    yield _loopback()


def _python() -> Finding:
    """Versions older than the supported ones never get here: the package cannot be installed into them."""
    return Finding("Python", State.GOOD, f"{platform.python_version()} at {sys.executable}; supported is 3.11 or later")


def _packages() -> Iterator[Finding]:
    """Every package that is required, against the versions that are supported; those that fit in one line."""
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        yield Finding("packages", State.LACKING, f"cannot be looked at: {error}", "make setup")
        return
    try:
        wanted = [Requirement(text) for text in requires("megatron-deepstack") or ()]
    except PackageNotFoundError:
        yield Finding(
            "packages", State.LACKING, "megatron-deepstack itself is not installed here", "make setup, or pip install ."
        )
        return
    fitting = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(one.name)
        except PackageNotFoundError:
            yield Finding(f"package {one.name}", State.LACKING, "not installed", _install(one))
            continue
        if one.specifier.contains(there, prereleases=True):
            fitting.append(f"{one.name} {there}")
        else:
            yield Finding(f"package {one.name}", State.LACKING, f"{there}, supported is {one.specifier}", _install(one))
    yield Finding("packages", State.GOOD, ", ".join(fitting))


def _install(wanted: object) -> str:
    return f"pip install --constraint constraints.txt '{wanted}'"


def _cores() -> Finding:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{allowed} of {there} may be used" if allowed != there else f"{there}"
    return Finding("CPU cores", State.GOOD, found)


def _threads() -> Finding:
    """Ranks and workers that we start have one thread each; under torchrun the variable counts."""
    value = os.environ.get("OMP_NUM_THREADS")
    subject, cores = "OMP_NUM_THREADS", len(os.sched_getaffinity(0))
    if value is None:
        return Finding(subject, State.GOOD, "not set; ranks and workers that are started here get 1")
    if value.isdigit() and 0 < int(value) <= cores:
        return Finding(subject, State.GOOD, value)
    return Finding(
        subject,
        State.NOTE,
        f"{value}, with {cores} cores",
        "export OMP_NUM_THREADS=1: each rank starts so many threads",
    )


def _memory() -> Finding:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    machine, free = 1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"]
    total = min(_container_memory() or machine, machine)
    found = f"{data_size(total)}, {data_size(min(free, total))} free"
    if total >= _ENOUGH_MEMORY:
        return Finding("memory", State.GOOD, found)
    advice = "each rank takes about 0.6 GB before its model: use few ranks, or raise the container's limit"
    return Finding("memory", State.NOTE, found, advice)


def _container_memory() -> int | None:
    """The limit of this process's control group in bytes; None without one."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return int(Path(file).read_text(encoding="ascii"))
    return None


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding("shared memory", State.NOTE, f"/dev/shm: {error.strerror}", "mount a tmpfs at /dev/shm")
    found = f"/dev/shm has {data_size(usage.total)}, {data_size(usage.free)} free"
    if usage.free >= _ENOUGH_SHARED:
        return Finding("shared memory", State.GOOD, found)
    return Finding(
        "shared memory",
        State.NOTE,
        found,
        "docker run --ipc=host or --shm-size=16g; in Kubernetes an emptyDir of medium Memory at /dev/shm",
    )


def _disks(folder: Path) -> Iterator[Finding]:
    places = (("disk for runs", folder.absolute()), ("disk for temporary files", Path(_temporary())))
    for subject, place in places:
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            usage = shutil.disk_usage(place)
        except OSError as error:
            what = f"{place} cannot be written: {error.strerror or error}"
            advice = "name a folder that may be written and has room"
            if subject.endswith("files"):
                advice = f"{advice}, with TMPDIR"
            yield Finding(subject, State.LACKING, what, advice)
            continue
        found = f"{place} has {data_size(usage.free)} free of {data_size(usage.total)}"
        enough = usage.free >= _ENOUGH_DISK
        advice = "" if enough else "`plan` and `preprocess` say how much a run and a store need"
        yield Finding(subject, State.GOOD if enough else State.NOTE, found, advice)


def _temporary() -> str:
    """The folder that is asked for, or the one that Python finds. Python itself silently ignores a folder that is asked
    for but not usable."""
    try:
        return os.environ.get("TMPDIR") or tempfile.gettempdir()
    except OSError:
        return "/tmp"


def _locks(folder: Path) -> Finding:
    """Two runs on one folder are kept apart by a lock, which some network file systems do not have."""
    subject = "file locks"
    try:
        with tempfile.NamedTemporaryFile(dir=folder.absolute()) as file:
            for name, lock in (("flock", fcntl.flock), ("lockf", fcntl.lockf)):
                try:
                    lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lock(file.fileno(), fcntl.LOCK_UN)
                except OSError as error:
                    advice = "nothing keeps a second run off the same folder there: mount with locks, or take care"
                    return Finding(subject, State.NOTE, f"{name} in {folder.absolute()}: {error.strerror}", advice)
    except OSError:
        return Finding(subject, State.NOTE, f"not tried: {folder.absolute()} cannot be written")
    return Finding(subject, State.GOOD, f"work in {folder.absolute()}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} at a time, at most {'any number' if hard == resource.RLIM_INFINITY else hard}"
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return Finding("open files", State.GOOD, found)
    state = State.NOTE if soft >= _FEWEST_FILES else State.LACKING
    return Finding("open files", state, found, f"ulimit -n {_ENOUGH_FILES}: large stores and Ray open many")


def _loopback() -> Finding:
    """Ranks of one machine meet on a port of 127.0.0.1 that the operating system picks."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5):
                server.accept()[0].close()
    except OSError as error:
        return Finding(
            "ports on loopback",
            State.LACKING,
            f"127.0.0.1: {error}",
            "ranks meet there: allow TCP on the loopback interface",
        )
    name = socket.gethostname()
    with suppress(OSError):
        address = socket.gethostbyname(name)
        return Finding("ports on loopback", State.GOOD, f"work; this host, {name}, is {address}")
    advice = "for runs on several machines its name must resolve, in /etc/hosts or DNS"
    return Finding("ports on loopback", State.NOTE, f"work; the name of this host, {name}, does not resolve", advice)
