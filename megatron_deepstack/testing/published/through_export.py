"""A reference case through export and back: its weights in both layouts, and what each of them computes.

The case's weights are written under published names, converted to Hugging Face's layout, and back. What comes back is
the case that ranks then compute: its model is the one that the files' config.json describes. transformers computes the
folder in between by itself, so that the expected logits also hold for what others load.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_deepstack.convert.export import write_model
from megatron_deepstack.convert.exported_folder import read_exported
from megatron_deepstack.convert.folders import convert_folder
from megatron_deepstack.convert.hf_names import Naming
from megatron_deepstack.convert.tensor_files import LazyTensor
from megatron_deepstack.errors import DataError
from megatron_deepstack.model.published_shapes import published_shapes
from megatron_deepstack.testing.parity.by_folder import TransformersFolder
from megatron_deepstack.testing.parity.drawn import DrawnSample
from megatron_deepstack.testing.published.case_result import LOGITS_TOLERANCE
from megatron_deepstack.testing.published.reference_case import ReferenceCase


@dataclass(frozen=True, slots=True)
class ExportResult:
    """How far transformers is from the published logits with an exported case."""

    name: str
    num_changed: int
    """Tensors that did not come back byte for byte."""
    logits_error: float

    @property
    def passed(self) -> bool:
        """Every tensor came back, and logits are within their tolerance."""
        return self.num_changed == 0 and self.logits_error <= LOGITS_TOLERANCE

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return (
            f"{verdict} {self.name}, exported: logits by transformers {self.logits_error:.1e} absolute, "
            f"{self.num_changed} tensors changed on the way back"
        )


def through_export(case: ReferenceCase) -> tuple[ReferenceCase, ExportResult]:
    """Write a case in both layouts and read it back.

    Args:
        case: The case.

    Returns:
        The case with the model and the weights that came back, and what transformers computes on the way.

    Raises:
        DataError: The case's weights are not those of its model.
    """
    with tempfile.TemporaryDirectory(prefix="through-export-") as scratch:
        paper, theirs, back = (Path(scratch) / name for name in ("paper", "hugging_face", "back"))
        shapes = published_shapes(case.model)
        missing = [name for name in shapes if name not in case.weights]
        if missing:
            raise DataError(f"{case.name}: its file holds no weight.{missing[0]}, which its model has")
        weights = {name: LazyTensor.of(case.weights[name].reshape(shape)) for name, shape in shapes.items()}
        write_model(weights, case.model, paper, Naming.PUBLISHED)
        convert_folder(paper, theirs, Naming.HUGGING_FACE)
        convert_folder(theirs, back, Naming.PUBLISHED)
        found = read_exported(back)
        tensors = {name: tensor.read() for name, tensor in found.tensors.items()}
        changed = sum(not torch.equal(tensors[name], tensor.read()) for name, tensor in weights.items())
        error = _logits_error(case, theirs)
    others = {name: tensor for name, tensor in case.weights.items() if name not in tensors}
    read_back = replace(case, model=found.model, weights={**others, **tensors})
    return read_back, ExportResult(case.name, changed, error)


def _logits_error(case: ReferenceCase, folder: Path) -> float:
    """Largest error of a logit, over all samples; a sample that was cut is cut here as well."""
    theirs, errors = TransformersFolder(folder, case.model), []
    for sample, expected in zip(case.samples, case.logits, strict=True):
        tokens = sample.tokens.numpy().astype(np.int64)
        asked = DrawnSample(name=case.name, tokens=tokens, loss_mask=np.ones_like(tokens), shapes=(), pixels=())
        pixels = [] if sample.pixel_values is None else [(sample.pixel_values.float().numpy(), sample.grids[0])]
        logits = theirs.logits(asked, pixels)
        difference = (logits[: len(expected)] - expected).abs().max()
        errors.append(float(torch.nan_to_num(difference, nan=float("inf"))))
    return max(errors)
