"""Manifests of this format, of the one before and of the next, and what is said of damaged ones."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_deepstack.checkpoint.content.identity import identity, require_same, require_same_run
from megatron_deepstack.checkpoint.folder import (
    MANIFEST,
    Manifest,
    OutOfReach,
    checkpoint_path,
    fingerprint,
    newest_whole,
    verify,
    write_manifest,
)
from megatron_deepstack.checkpoint.verification import shares
from megatron_deepstack.config.schema import LoraConfig, Recipe
from megatron_deepstack.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000002"
    path.mkdir()
    (path / "data").write_bytes(b"0123456789")
    write_manifest(
        path,
        Manifest(
            step=2,
            facts={"model": {"layers": 8}},
            files={"data": fingerprint(path / "data")},
            layout={"tp": 1},
            made_with={"torch": "2"},
        ),
    )
    return path


def edit(folder: Path, **changes: object) -> None:
    file = folder / MANIFEST
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_what_is_written_is_read(folder: Path) -> None:
    manifest = verify(folder).manifest
    assert (manifest.step, manifest.layout, manifest.made_with, manifest.version) == (2, {"tp": 1}, {"torch": "2"}, 4)


def test_the_format_before_is_read(folder: Path) -> None:
    edit(folder, version=1, layout=None, made_with=None)
    manifest = verify(folder).manifest
    assert (manifest.version, manifest.layout, manifest.made_with) == (1, {}, {})


def test_a_newer_format_is_named(folder: Path) -> None:
    edit(folder, version=5)
    with pytest.raises(CheckpointError, match=r"format version 5, this program reads up to 4; use the version that"):
        verify(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing or damaged"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is missing or damaged"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json is missing or damaged"),
        (lambda f: edit(f, files=None), "manifest.json is missing or damaged"),
        (lambda f: edit(f, files=[1]), "manifest.json is missing or damaged"),
        (lambda f: (f / "data").unlink(), "the file data is missing"),
        (lambda f: (f / "data").write_bytes(b"012"), "data has 3 bytes, 10 were written"),
        (lambda f: (f / "data").write_bytes(b"0123456780"), "data is damaged"),
    ],
    ids=["gone", "cut", "no-text", "no-files", "odd-files", "file-gone", "file-cut", "file-flipped"],
)
def test_damage_is_named(folder: Path, damage: object, words: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=words):
        verify(folder)


AWAY = (errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT)


@pytest.mark.parametrize("number", AWAY, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [MANIFEST, "data"])
def test_what_cannot_be_read_at_present_is_not_taken_for_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    """An older checkpoint in its place would throw away the work since."""
    run_dir = folder.parent / "run"
    newest = checkpoint_path(run_dir, 2)
    newest.parent.mkdir(parents=True)
    folder.rename(newest)
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    def read_text(path: Path, encoding: str) -> str:
        with refuse(path, encoding=encoding) as file:
            return str(file.read())

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*no older checkpoint is taken in its place"):
        newest_whole(run_dir)


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN], ids=errno.errorcode.get)
def test_a_broken_disk_is_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: Path) -> tuple[int, int]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("megatron_deepstack.checkpoint.folder.fingerprint", refuse)
    with pytest.raises(CheckpointError, match="data cannot be read") as caught:
        verify(folder)
    assert not isinstance(caught.value, OutOfReach)


def test_reading_is_shared_evenly() -> None:
    files = {f"part{n}": (size, 0) for n, size in enumerate([50, 10, 10, 30, 5, 0])}
    assert shares(files, 2) == [["part0", "part4"], ["part3", "part1", "part2", "part5"]]
    assert sorted(name for names in shares(files, 4) for name in names) == sorted(files)
    assert shares({}, 2) == [[], []]


def test_adapters_are_part_of_the_identity() -> None:
    """A checkpoint of before there were any was made without."""
    plain = identity(Recipe(), plan_hash="a", tokenizer_sha256="b")
    old = {key: value for key, value in plain.items() if key != "lora"}
    require_same(Path("old"), old, plain)
    adapted = identity(Recipe(lora=LoraConfig(rank=4)), plan_hash="a", tokenizer_sha256="b")
    with pytest.raises(CheckpointError, match=r"lora.rank: 0 in the checkpoint, 4 in the recipe"):
        require_same(Path("old"), old, adapted)


def test_a_field_that_did_not_exist_then_had_its_default() -> None:
    """Whatever fields are added to the model later, an older checkpoint stays readable, at any depth."""
    ours = identity(Recipe(), plan_hash="a", tokenizer_sha256="b")
    old = json.loads(json.dumps(ours))
    del old["model"]["vision"]["layernorm_epsilon"]
    del old["model"]["stacks"]
    require_same(Path("old"), old, ours)
    changed = json.loads(json.dumps(ours))
    changed["model"]["vision"]["layernorm_epsilon"] = 0.5
    with pytest.raises(
        CheckpointError, match=r"model\.vision\.layernorm_epsilon: .* in the checkpoint, 0\.5 in the recipe"
    ):
        require_same(Path("old"), old, changed)


NOW = {"stores": ["new.zarr"], "num_samples": 12}


@pytest.mark.parametrize("then", [{"stores": ["old.zarr"], "num_samples": 8}, {}], ids=["told", "older checkpoint"])
def test_other_samples_are_told_in_words_of_the_recipe(then: dict[str, object]) -> None:
    """No recipe has a plan hash; its stores and numbers of samples are what a user knows."""
    saved = identity(Recipe(), plan_hash="a", tokenizer_sha256="b")
    ours = identity(Recipe(), plan_hash="c", tokenizer_sha256="b")
    manifest = Manifest(step=3, facts=saved, files={}, samples=then)
    with pytest.raises(CheckpointError) as caught:
        require_same_run(Path("old"), manifest, ours, NOW)
    message = str(caught.value)
    assert ("trained on 8 samples of old.zarr" if then else "trained on other samples") in message
    assert "the recipe now reads 12 samples of new.zarr" in message
    assert "Set data.store (or data.stores and weights) back" in message
    assert "another run_dir" in message
    assert "plan_hash" not in message
    require_same_run(Path("old"), manifest, saved, NOW)


def test_another_tokenizer_is_told_in_words_of_the_recipe() -> None:
    saved = identity(Recipe(), plan_hash="a", tokenizer_sha256="b")
    ours = identity(Recipe(), plan_hash="a", tokenizer_sha256="d")
    with pytest.raises(CheckpointError, match=r"another tokenizer.*preprocess with that tokenizer") as caught:
        require_same_run(Path("old"), Manifest(step=3, facts=saved, files={}), ours, NOW)
    assert "tokenizer_sha256" not in str(caught.value)


def test_nodes_that_do_not_share_the_folder_are_named(tmp_path: Path) -> None:
    """Rank 0 finds its own note and not the other's."""
    from megatron_deepstack.checkpoint.saving.commit import _take_notes

    (tmp_path / ".written_by_rank_0.json").write_text('{"files": {}, "items": []}')
    with pytest.raises(OSError, match=r"rank 1 wrote elsewhere: .* run_dir must be one folder for all nodes"):
        _take_notes(tmp_path, 2)
