"""The container file, read as `docker build` reads it: what it copies is there, and it does not run as root."""

from __future__ import annotations

import json
import re

import pytest
from pages import ROOT, text_of

FILE = ROOT / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined."""
    lines = [line for line in text_of(FILE).splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def test_every_instruction_is_known() -> None:
    known = {"ARG", "FROM", "COPY", "RUN", "USER", "WORKDIR", "ENV", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} <= known


def test_the_base_has_a_version_and_can_be_replaced() -> None:
    (name, image), (start, base), *_ = instructions()
    assert (name, start, base) == ("ARG", "FROM", "${TORCH_IMAGE}")
    assert re.fullmatch(r"TORCH_IMAGE=[\w./-]+:[\w.-]*cuda[\w.-]+", image)
    assert "latest" not in image


@pytest.mark.parametrize("source", [line.split()[0] for line in arguments_of("COPY")])
def test_what_is_copied_is_there_and_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    assert f"!{source}" in text_of(ROOT / ".dockerignore").splitlines()


def test_all_packages_are_copied() -> None:
    found = re.findall(r"\"([\w]+)\*\"", re.search(r"find_packages\((.*)\)", text_of(ROOT / "setup.py"))[1])
    assert set(found) <= {line.split()[0] for line in arguments_of("COPY")}


def test_the_torch_of_the_image_stays() -> None:
    (install,) = [line for line in arguments_of("RUN") if "pip install" in line]
    assert "--constraint /tmp/torch.txt" in install
    assert install.index("torch.__version__") < install.index("pip install")


def test_it_does_not_run_as_root() -> None:
    names = [name for name, _ in instructions()]
    assert arguments_of("USER")[-1] not in ("root", "0")
    assert "RUN" not in names[names.index("USER") :]
    assert any(f"useradd --create-home --uid 10001 {arguments_of('USER')[-1]}" in line for line in arguments_of("RUN"))


def test_it_starts_the_command_line() -> None:
    (entry,), (first,) = arguments_of("ENTRYPOINT"), arguments_of("CMD")
    assert f'"{json.loads(entry)[0]} = megatron_deepstack.cli:main"' in text_of(ROOT / "setup.py")
    assert json.loads(first) == ["--help"]
