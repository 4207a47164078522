"""A tokenizer and the folder of reference data."""

import os
from pathlib import Path

import pytest

from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.testing.tiny_data import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.model"))


@pytest.fixture(scope="session")
def reference() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference"
    folder = Path(os.environ.get("DEEPSTACK_REFERENCE", beside))
    if not folder.is_dir():
        pytest.skip(f"reference data is not at {folder} (set DEEPSTACK_REFERENCE)")
    return folder
