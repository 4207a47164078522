"""What lmms-eval reads from the entry-point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model's name and class, as lmms-eval's registry takes them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="megatron_deepstack",
        simple_class_path="megatron_deepstack.inference.lmms.model.MegatronDeepStack",
    )
