"""The README: its commands run, its layout is the code's, its picture is the program's, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.testing.tiny_data import write_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LLAMA = ROOT.parent / "shared" / "reference" / "tokenizer" / "llama2.model"
PHOTOS = ("astronaut", "coffee", "rocket", "chelsea")
"""Real photographs that scikit-image carries."""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program: str, text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [words[1:] for words in map(shlex.split, lines) if words and words[0] == program]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_layout_is_current():
    spec = importlib.util.spec_from_file_location("readme_tree", ROOT / "tools" / "readme_tree.py")
    assert spec is not None
    assert spec.loader is not None
    readme_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_tree)
    assert readme_tree.written(README) == README, "run python tools/readme_tree.py"


def test_picture_is_what_its_command_draws(tmp_path):
    (command,) = [words for words in commands("megatron-deepstack") if words[0] == "plan" and "--svg" in words]
    drawn = tmp_path / "stages.svg"
    result = CliRunner().invoke(app, [*command[:-1], str(drawn)])
    assert result.exit_code == 0, result.output
    shown = ROOT / re.search(r"!\[.*?\]\((.*?\.svg)\)", README).group(1)
    assert shown.read_text(encoding="utf-8") == drawn.read_text(encoding="utf-8"), f"run the command, write {shown}"


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("https://")]
    assert len(targets) > 8
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_six_files_to_read():
    numbered = re.findall(r"^(\d)\. \[.*?\]\((.*?)\)", section("Where to read"), re.MULTILINE)
    assert [number for number, _ in numbered] == list("123456")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", sorted({words[0] for words in commands("make")} | {"setup", "lint"}))
def test_make_targets_exist(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", commands("megatron-deepstack"), ids=" ".join)
def test_verbs_and_options_exist(words):
    verb = words[:2] if words[0] == "store" else words[:1]
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert not [word for word in words if word.startswith("--") and word not in result.output]


def test_words_of_the_glossary_are_there():
    words = "view crop grid mosaic stack slot row injection route stage chunk store shard sample pack recipe run"
    assert not [word for word in words.split() if f"\n| {word} |" not in section("Glossary")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: photos, photos.json, a tokenizer and my.yaml."""
    from skimage import data, io

    folder = tmp_path_factory.mktemp("own_data")
    (folder / "photos").mkdir()
    records = []
    for name in PHOTOS:
        io.imsave(folder / "photos" / f"{name}.jpg", getattr(data, name)(), check_contrast=False)
        turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"This is {name}.")]
        conversations = [{"from": who, "value": said} for who, said in turns]
        records.append({"id": name, "image": f"{name}.jpg", "conversations": conversations})
    (folder / "photos.json").write_text(json.dumps(records))
    (recipe,) = [block for block in blocks("yaml") if block.startswith("# my.yaml")]
    (folder / "my.yaml").write_text(recipe)
    if LLAMA.is_file():
        shutil.copy(LLAMA, folder / "llama2.model")
    else:
        write_tokenizer(folder / "llama2.model")
    return folder


def run(words: list[str], folder: Path) -> str:
    """What a command prints; it must succeed, and nothing that it started outlives it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_deepstack.cli", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{' '.join(words)}\n{said}"
    return said


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_lines_for_own_data_run_on_real_photographs(workplace):
    said = {words[0]: run(words, workplace) for words in commands("megatron-deepstack", section("On your own data"))}
    assert "4 samples, 4 images" in said["preprocess"]
    assert "step 20/20" in said["train"]
    assert "What is in the picture?" in said["generate"]
    report = (workplace / "my-run" / "report.html").read_text(encoding="utf-8")
    assert report.count("<img ") >= 4 * 3
    about_stores = [words for words in commands("megatron-deepstack", section("Preprocessing")) if words[0] == "store"]
    said = {words[1]: run(words, workplace) for words in about_stores}
    assert "4 samples" in said["merge"]
    assert (workplace / "samples.html").is_file()
