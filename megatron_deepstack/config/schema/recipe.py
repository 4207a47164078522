"""The recipe as a whole: its sections, its name and its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_deepstack.config.constraints import NotBlank, PathKind
from megatron_deepstack.config.schema.data import DataConfig
from megatron_deepstack.config.schema.model import LoraConfig, ModelConfig
from megatron_deepstack.config.schema.operation import CheckpointConfig, HealthConfig, LaunchConfig, LoggingConfig
from megatron_deepstack.config.schema.training import OptimizerConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run."""

    name: Annotated[str, NotBlank()] = "run"
    """Name in logs and reports."""
    run_dir: Annotated[str, NotBlank(), PathKind.LOCAL] = "runs/run"
    """Folder of the run: resolved recipe, metrics, TensorBoard files, checkpoints, report. A run goes on from the
    newest checkpoint that it finds there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it learns from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """What counts as trouble."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """The job on a Ray cluster."""
