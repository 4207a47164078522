"""Every page: its links lead somewhere, its commands exist, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pages import PAGES, README, ROOT, anchors, commands, links, name_of, text_of
from typer.testing import CliRunner

from megatron_deepstack import errors
from megatron_deepstack.cli import app
from megatron_deepstack.cli.app import INTERRUPTED

MOST_README_LINES = 200


def test_readme_is_short():
    assert text_of(README).count("\n") <= MOST_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    lost = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost, f"{name_of(page)} links to what is not there: {lost}"


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
    assert set(PAGES) <= reached, f"nothing links to {sorted(map(name_of, set(PAGES) - reached))}"


MADE = sorted({words[0] for page in PAGES for words in commands("make", text_of(page))} | {"setup", "lint", "test-all"})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", MADE)
def test_make_targets_exist(target: str):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TYPED = {" ".join(words): words for page in PAGES for words in commands("megatron-deepstack", text_of(page))}


@pytest.mark.parametrize("words", TYPED.values(), ids=TYPED)
def test_verbs_and_options_exist(words: list[str]):
    verb = words[:2] if words[0] == "store" else words[:1]
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert not [word for word in words if word.startswith("--") and word not in result.output]


@pytest.mark.parametrize("tool", ["layout_page", "options_page"])
def test_generated_pages_are_current(tool: str):
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text_of(module.PAGE) == module.page(), f"run python tools/{tool}.py"


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"], ids=name_of
)
def test_files_of_the_toolchain_are_yaml(file: Path):
    assert isinstance(yaml.safe_load(text_of(file)), dict)


def test_the_gpu_job_is_skipped_without_a_runner():
    jobs = yaml.safe_load(text_of(ROOT / ".github" / "workflows" / "ci.yml"))["jobs"]
    assert jobs["gpu"]["if"] == "${{ vars.GPU_RUNNER != '' }}"
    assert any(step.get("run") == "bash .ci/run" for step in jobs["test"]["steps"])


WIDEST = 120
"""Characters of a line of prose, as of a line of code; rows of tables cannot be broken."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_fit_an_editor(page: Path):
    lines = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL).splitlines()
    wide = [line for line in lines if len(line) > WIDEST and not line.startswith(("|", "    "))]
    assert not wide, f"{name_of(page)}: more than {WIDEST} characters: {wide}"


def test_every_exit_code_is_listed():
    _, _, section = text_of(ROOT / "docs" / "survival.md").partition("## Exit codes")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", section, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.exit_code for kind in kinds if kind is not errors.DeepStackError} | {0, INTERRUPTED} == listed
