"""The recipe as a whole: its sections, its name and its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_deepstack.config.constraints import NotBlank, PathKind
from megatron_deepstack.config.schema.data import DataConfig
from megatron_deepstack.config.schema.evaluation import EvaluationConfig
from megatron_deepstack.config.schema.model import LoraConfig, ModelConfig
from megatron_deepstack.config.schema.operation import CheckpointConfig, HealthConfig, LaunchConfig, LoggingConfig
from megatron_deepstack.config.schema.speed import SpeedConfig
from megatron_deepstack.config.schema.training import OptimizerConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run."""

    name: Annotated[str, NotBlank()] = "run"
    """Name in logs and reports."""
    run_dir: Annotated[str, NotBlank(), PathKind.LOCAL] = "runs/run"
    """Folder of the run: resolved recipe, metrics, TensorBoard files, checkpoints, report. A run continues from the
    newest checkpoint that it finds there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model that is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data that it learns from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout of the model over ranks."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Fusions and overlaps."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer, AdamW, and its learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Questions that are asked during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved, and which are kept."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters of the decoder."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """What counts as a problem of the run."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics, profiles and timelines."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """The job on a Ray cluster."""
