"""The recipe: everything a run is asked to do, as frozen dataclasses, one per YAML section.

This package only declares. Each field's type, unit and range stand in its annotation, its meaning in the string below
it; the options page of the documentation is made from them. Reading YAML and overrides is `load`, checking values
against each other is `check`. Derived numbers (tokens per view, layers per stage, ...) are functions in `planning`,
never fields. Begin with `recipe`, which lists the sections.
"""

from megatron_deepstack.config.schema.data import DataConfig
from megatron_deepstack.config.schema.model import LanguageConfig, LoraConfig, ModelConfig, StackConfig, VisionConfig
from megatron_deepstack.config.schema.operation import CheckpointConfig, HealthConfig, LaunchConfig, LoggingConfig
from megatron_deepstack.config.schema.recipe import Recipe
from megatron_deepstack.config.schema.training import OptimizerConfig, ParallelConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "HealthConfig",
    "LanguageConfig",
    "LaunchConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "StackConfig",
    "TrainConfig",
    "VisionConfig",
]
