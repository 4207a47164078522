"""The README: its picture is the program's, its commands for own data run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from commands import run
from pages import README as PAGE
from pages import ROOT, blocks, commands, section, text_of
from typer.testing import CliRunner

from megatron_deepstack.cli import app
from megatron_deepstack.testing.tiny_data import write_tokenizer

README = text_of(PAGE)
PREPROCESSING = text_of(ROOT / "docs" / "preprocessing.md")
ARCHITECTURE = text_of(ROOT / "docs" / "architecture.md")
GLOSSARY = text_of(ROOT / "docs" / "glossary.md")
PHOTOS = ("astronaut", "coffee", "rocket", "chelsea")
"""Real photographs that scikit-image carries."""


def test_picture_is_what_its_command_draws(tmp_path):
    (command,) = [words for words in commands("megatron-deepstack", README) if words[0] == "plan" and "--svg" in words]
    drawn = tmp_path / "stages.svg"
    result = CliRunner().invoke(app, [*command[:-1], str(drawn)])
    assert result.exit_code == 0, result.output
    shown = ROOT / re.search(r"!\[.*?\]\((.*?\.svg)\)", README).group(1)
    assert shown.read_text(encoding="utf-8") == drawn.read_text(encoding="utf-8"), f"run the command, write {shown}"


def test_six_files_to_read():
    numbered = re.findall(r"^(\d)\. \[.*?\]\((.*?)\)", section("Where to begin reading", ARCHITECTURE), re.MULTILINE)
    assert [number for number, _ in numbered] == list("123456")


def test_words_of_the_glossary_are_there():
    words = "view crop grid mosaic stack slot row injection route stage chunk store shard sample pack recipe run"
    of_help = "rank replica layout plan checkpoint record template target token variant tower projector encoder decoder"
    assert not [word for word in f"{words} {of_help}".split() if f"\n| {word} |" not in GLOSSARY]


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
    (recipe,) = [block for block in blocks("yaml", README) if block.startswith("# my.yaml")]
    (folder / "my.yaml").write_text(recipe)
    llama = (
        Path(os.environ.get("DEEPSTACK_REFERENCE", ROOT.parent / "shared" / "reference")) / "tokenizer" / "llama2.model"
    )
    if llama.is_file():
        shutil.copy(llama, folder / "llama2.model")
    else:
        write_tokenizer(folder / "llama2.model")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_lines_for_own_data_run_on_real_photographs(workplace):
    said = {
        words[0]: run(words, workplace) for words in commands("megatron-deepstack", section("On your own data", README))
    }
    assert "4 samples, 4 images" in said["preprocess"]
    assert "step 20/20" in said["train"]
    assert "What is in the picture?" in said["generate"]
    report = (workplace / "my-run" / "report.html").read_text(encoding="utf-8")
    assert report.count("<img ") >= 4 * 3
    about_stores = [
        words
        for words in commands("megatron-deepstack", section("Finished stores", PREPROCESSING))
        if words[0] == "store"
    ]
    said = {words[1]: run(words, workplace) for words in about_stores}
    assert "4 samples" in said["merge"]
    assert (workplace / "samples.html").is_file()
