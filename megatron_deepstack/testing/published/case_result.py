"""How far a reference case is from the published numbers, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

LOGITS_TOLERANCE = 2e-5
"""Largest absolute error of a logit, float32."""
GRADIENT_TOLERANCE = 1e-4
"""Largest error of a gradient's entry, relative to the tensor's largest."""
LOSS_TOLERANCE = 1e-5
"""Largest relative error of the loss."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How far a case is from the published numbers."""

    name: str
    logits_error: float
    loss_error: float
    gradient_error: float
    gradient_name: str

    @property
    def passed(self) -> bool:
        """Within all tolerances."""
        return (
            self.logits_error <= LOGITS_TOLERANCE
            and self.loss_error <= LOSS_TOLERANCE
            and self.gradient_error <= GRADIENT_TOLERANCE
        )

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return (
            f"{verdict} {self.name}: logits {self.logits_error:.1e} absolute, loss {self.loss_error:.1e}, "
            f"gradients {self.gradient_error:.1e} relative, worst {self.gradient_name}"
        )
