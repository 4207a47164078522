"""The recipe: everything a run is asked to do, as frozen dataclasses, one per YAML section.

The one idea: this package only declares. Each field's type, unit and range are in its annotation, and its meaning is
in the string below it; the options page of the documentation is made from both. `load` reads YAML and overrides, and
`check` compares values with each other. Numbers that follow from fields (tokens per view, layers per stage) are
functions in `sizes` and `planning`, never fields. Begin with `recipe`, which lists the sections.
"""

from megatron_deepstack.config.schema.data import DataConfig
from megatron_deepstack.config.schema.evaluation import EvaluationConfig
from megatron_deepstack.config.schema.model import (
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    RopeScalingConfig,
    StackConfig,
    VisionConfig,
)
from megatron_deepstack.config.schema.operation import CheckpointConfig, HealthConfig, LaunchConfig, LoggingConfig
from megatron_deepstack.config.schema.recipe import Recipe
from megatron_deepstack.config.schema.speed import SpeedConfig
from megatron_deepstack.config.schema.training import OptimizerConfig, ParallelConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "HealthConfig",
    "LanguageConfig",
    "LaunchConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "QFormerConfig",
    "Recipe",
    "RopeScalingConfig",
    "SpeedConfig",
    "StackConfig",
    "TrainConfig",
    "VisionConfig",
]
