"""`tools/gpu_wheels.sh` with a pip that downloads nothing: what it asks for, what it prints, when it refuses."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PIP = r"""#!/usr/bin/env bash
while [ $# -gt 0 ]; do
  case "$1" in
    --dest) dest=$2; shift ;;
    *==*) head -c "${BYTES:-1024}" /dev/zero > "$dest/${1%%==*}-${1##*==}-py3-none-any.whl" ;;
  esac
  echo "$1" >> "$ASKED"
  shift
done
"""


@pytest.fixture
def wheels(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs the script with a pip of ours; `asked` is what pip was given."""
    (tmp_path / "python").write_text(PIP)
    (tmp_path / "python").chmod(0o755)
    asked = tmp_path / "asked"

    def run(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "gpu_wheels.sh"), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(tmp_path / "python"), "ASKED": str(asked), **environment},
        )
        return done, asked.read_text().split() if asked.exists() else []

    return run


def test_versions_are_those_of_constraints_for_python_3_12(wheels, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "wheels"
    done, asked = wheels(str(folder))
    assert done.returncode == 0, done.stderr
    wanted = [word for word in asked if re.fullmatch(r"[\w-]+==[\w.]+", word)]
    assert {word.split("==")[0] for word in wanted} == {
        "megatron-core",
        "numcodecs",
        "simplejpeg",
        "omegaconf",
        "google-crc32c",
    }
    constraints = (ROOT / "constraints.txt").read_text()
    for word in wanted:
        line = next(line for line in constraints.splitlines() if line.startswith(word))
        assert "<" not in line
    assert "3.12" in asked
    assert "--no-deps" in asked
    assert len(done.stdout.splitlines()) == len(wanted) + 1
    assert "in all; at most 40 are meant to travel" in done.stdout


def test_the_engine_s_wheels_go_along(wheels, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "transformer_engine-2-py3-none-any.whl").write_bytes(b"x" * 2**20)
    done, _ = wheels(str(tmp_path / "wheels"), "--engine", str(engine))
    assert done.returncode == 0, done.stderr
    assert "    1.00 MiB  transformer_engine-2-py3-none-any.whl" in done.stdout
    assert (tmp_path / "wheels" / "transformer_engine-2-py3-none-any.whl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]"),
        (["--engine", "x"], "usage: tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]"),
        (["WHEELS", "--engine"], "usage: tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]"),
        (["WHEELS", "--engine", "nowhere"], "--engine nowhere: no wheel lies there; give the folder that holds them"),
    ],
)
def test_what_it_refuses(wheels, tmp_path: Path, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    done, asked = wheels(*[str(tmp_path / word) if word == "WHEELS" else word for word in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert not asked


def test_too_much_to_travel_is_an_error(wheels, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done, _ = wheels(str(tmp_path / "wheels"), BYTES=str(9 * 2**20))
    assert done.returncode == 2
    assert "the wheels take more than 40 MiB together; leave some out" in done.stderr


def test_no_package_host_is_named() -> None:
    assert "://" not in (ROOT / "tools" / "gpu_wheels.sh").read_text()
