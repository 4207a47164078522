"""The section `evaluation`: questions that are asked and scored at intervals while a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_deepstack.config.choices import ScoreMetric
from megatron_deepstack.config.constraints import NOT_NEGATIVE, POSITIVE, PathKind, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Questions with known answers, which all ranks of the run answer at intervals; training itself stays the same."""

    interval: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 0
    """Steps between evaluations; the last step is always followed by one. 0 for never."""
    store: Annotated[str, PathKind.LOCATION] | None = None
    """Zarr store of questions; if neither this nor `file` is set, `data.validation_store`."""
    file: Annotated[str, PathKind.LOCAL] | None = None
    """File of questions in place of a store: JSON lines with `question_id`, `image`, `text` and `answers`."""
    images: Annotated[str, PathKind.LOCATION] | None = None
    """Folder or URL to which the pictures of `file` are relative; if null, the folder of the file."""
    limit: Annotated[int, POSITIVE, Unit("questions")] | None = None
    """Only so many questions, from the first one; if null, all."""
    max_new_tokens: Annotated[int, POSITIVE, Unit("tokens")] = 64
    """Longest answer to a question; what the model would say after it is left out."""
    metric: ScoreMetric = ScoreMetric.EXACT_MATCH
    """The score that the console shows and the report calls the best; all scores are recorded."""
