"""Folders that several tests of exports share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_folders import MODELS, Folder, drawn_weights

from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.export_files import About
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.testing.tiny_data import write_tokenizer


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A function that gives the exported folder of a model of `MODELS`, made when it is first asked for."""
    place = tmp_path_factory.mktemp("folders")
    tokenizer = load_tokenizer(write_tokenizer(place / "tokenizer.model"))

    def make(name: str) -> Path:
        if not (place / name).exists():
            model = MODELS[name]
            lazy = {key: LazyTensor.of(value) for key, value in drawn_weights(model).items()}
            write_model(lazy, model, place / name, Naming.HUGGING_FACE, tokenizer, About(seq_length=512))
        return place / name

    return make
