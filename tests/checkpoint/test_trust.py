"""Loading executes nothing: an index or object that names anything but data is refused before it is unpickled."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from trained_rank import TrainedRank, saving_recipe

from megatron_deepstack.checkpoint.folder import fingerprint
from megatron_deepstack.checkpoint.trust import check_contents, check_extra_states
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


def add_object(folder: Path, key: str, content: Any) -> None:
    """Put an object into the index, which then holds no other."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    stream = io.BytesIO()
    torch.save([content], stream)
    (folder / "object").write_bytes(b"before" + stream.getvalue())
    index = index_of(folder)
    for other in [key for key, stored in index.state_dict_metadata.items() if isinstance(stored, BytesStorageMetadata)]:
        del index.state_dict_metadata[other]
    index.state_dict_metadata[key] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(key)] = _StorageInfo("object", 6, len(stream.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("evil", [True, False], ids=["evil", "data"])
def test_objects_among_the_tensors(folder: Path, evil: bool) -> None:
    add_object(folder, "extra", Evil(folder / "trace") if evil else {"step": 3})
    if evil:
        with pytest.raises(CheckpointError, match="the object extra holds more than data"):
            check_contents(folder)
        assert not (folder / "trace").exists()
    else:
        check_contents(folder)


class HiddenInStorage:
    """Pickled as torch pickles a storage: as bytes that torch unpickles once more."""

    def __init__(self, content: object) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        stream = io.BytesIO()
        torch.save(self.content, stream)
        return torch.storage._load_from_bytes, (stream.getvalue(),)


HISTORY = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"num_gemms": 1}}
EXTRA_STATES = {
    "nothing": (lambda trace: b"", None),
    "history": (lambda trace: pickle.dumps(HISTORY), None),
    "evil": (lambda trace: pickle.dumps({**HISTORY, "recipe": Evil(trace)}), r"it names (posix|os)\.mkdir"),
    "evil-in-a-storage": (lambda trace: pickle.dumps(HiddenInStorage(Evil(trace))), "mkdir"),
    "cut": (lambda trace: pickle.dumps(HISTORY)[:-9], "extra_state"),
    "no-pickle": (lambda trace: b"no pickle", "extra_state"),
}


@pytest.mark.parametrize(("content", "words"), EXTRA_STATES.values(), ids=EXTRA_STATES)
def test_bytes_that_transformer_engine_would_unpickle(
    folder: Path, content: Callable[[Path], bytes], words: str | None
) -> None:
    stored = torch.tensor(list(content(folder / "trace")), dtype=torch.uint8)
    add_object(folder, "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4", stored)
    check_contents(folder)
    if words is None:
        check_extra_states(folder)
    else:
        with pytest.raises(CheckpointError, match=words):
            check_extra_states(folder)
        assert not (folder / "trace").exists()


def extra_states_taken(rank: int, recipe: Recipe, path: Path) -> list[object]:
    """What layers are given to unpickle where a checkpoint is loaded."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_deepstack.checkpoint.folder import verify
    from megatron_deepstack.checkpoint.load import load

    taken: list[object] = []
    trained = TrainedRank(recipe)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ColumnParallelLinear, "set_extra_state", lambda _, state: taken.append(state))
        load(verify(path), trained.model, None)
    return [state for state in taken if state is not None]  # Megatron's hook fills in nothing for what is missing


def test_extra_states_are_neither_written_nor_taken_but_under_delayed_scaling(
    ranks: Pools, written: Path, tmp_path: Path
) -> None:
    """Although these layers offer some, and although the common part of a forged checkpoint brings one."""
    assert not [key for key in index_of(written).state_dict_metadata if "_extra_state" in key]
    forged = tmp_path / "forged"
    shutil.copytree(written, forged)
    file = forged / "common.pt"
    common = torch.load(file, weights_only=True) if file.exists() else {}  # Megatron-Core reads it still after 0.16
    evil = torch.tensor(list(pickle.dumps(Evil(tmp_path / "trace"))), dtype=torch.uint8)
    common["model"] = {"decoder0": {"decoder.layers.0.self_attention.linear_qkv._extra_state": evil}}
    torch.save(common, file)
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["files"]["common.pt"] = fingerprint(file)
    (forged / "manifest.json").write_text(json.dumps(manifest))
    assert ranks(2).run(extra_states_taken, saving_recipe(tmp_path), forged) == [[], []]
