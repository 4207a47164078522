"""Loading executes nothing: an index or object that names anything but data is refused before it is unpickled."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from trained_rank import TrainedRank, saving_recipe

from megatron_deepstack.checkpoint.trust import check_contents
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.errors import CheckpointError
from megatron_deepstack.testing.ranks import RankPool

Pools = Callable[[int], RankPool]


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def save_once(rank: int, recipe: Recipe) -> Path:
    trained = TrainedRank(recipe)
    trained.step()
    trained.saver.begin(1)
    saved = trained.saver.finish()
    assert saved is not None
    trained.saver.close()
    return saved.path


@pytest.fixture(scope="module")
def written(ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    path: Path = ranks(2).run(save_once, saving_recipe(tmp_path_factory.mktemp("trust")))[0]
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of its index, to be tampered with."""
    (tmp_path / ".metadata").write_bytes((written / ".metadata").read_bytes())
    return tmp_path


def test_what_is_written_passes(written: Path) -> None:
    check_contents(written)


def index_of(folder: Path) -> Metadata:
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return index


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_an_index_that_executes_is_refused(folder: Path, place: str) -> None:
    evil: Any = Evil(folder / "trace")
    if place == "inside":
        index = copy.copy(index_of(folder))
        index.planner_data = evil
        evil = index
    (folder / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"it names (posix|os)\.mkdir, which no index holds"):
        check_contents(folder)
    assert not (folder / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps({"a": 1})])
def test_a_broken_index_is_named(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        check_contents(folder)


def test_a_missing_index_is_named(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_contents(folder)


@pytest.mark.parametrize("evil", [True, False], ids=["evil", "data"])
def test_objects_among_the_tensors(folder: Path, evil: bool) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    stream = io.BytesIO()
    torch.save([Evil(folder / "trace") if evil else {"step": 3}], stream)
    (folder / "object").write_bytes(b"before" + stream.getvalue())
    index = index_of(folder)
    index.state_dict_metadata["extra"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("extra")] = _StorageInfo("object", 6, len(stream.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for key, stored in list(index.state_dict_metadata.items()):
        if isinstance(stored, BytesStorageMetadata) and key != "extra":
            del index.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    if evil:
        with pytest.raises(CheckpointError, match="the object extra holds more than data"):
            check_contents(folder)
        assert not (folder / "trace").exists()
    else:
        check_contents(folder)
