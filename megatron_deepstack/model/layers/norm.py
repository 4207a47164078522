"""LayerNorm and RMSNorm for Megatron's local layers, with sequence parallelism.

Megatron's own wrapper of torch's norms refuses sequence parallelism. All it takes is a mark on the parameters: each tp
rank sees its part of the sequence, so `finalize_model_grads` must sum these gradients over tp.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm(torch.nn.Module):
    """Makes `torch.nn.LayerNorm` or `torch.nn.RMSNorm` as `config.normalization` says; used like a class."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> torch.nn.Module:
        """`**_` swallows options of Megatron's fused norms, which do not change the result."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
