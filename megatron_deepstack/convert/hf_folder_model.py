"""The model of a Hugging Face folder, from its config.json alone."""

from __future__ import annotations

from pathlib import Path

from megatron_deepstack.config.schema import ModelConfig
from megatron_deepstack.convert.hf_config import read_config, require_same_model
from megatron_deepstack.convert.hf_facts import CONFIG
from megatron_deepstack.convert.hf_whole import model_of_config
from megatron_deepstack.errors import CheckpointError


def model_of_folder(folder: Path) -> ModelConfig:
    """Read the model of a folder from its config.json, and refuse whatever else that file says.

    Args:
        folder: A Hugging Face folder.

    Returns:
        The model.

    Raises:
        CheckpointError: There is no config.json, or it describes something that is not computed here; the message names
            the file and each key.
    """
    config = read_config(folder)
    where = str(folder / CONFIG)
    if not config:
        raise CheckpointError(f"{where}: no such file; name a Hugging Face folder with {CONFIG}")
    model = model_of_config(config, where)
    require_same_model(config, model, str(folder))
    return model
