"""Buffers of Transformer Engine in which tensor-parallel ranks exchange activations beside matrix products.

They are made for one number of tokens, before the layers that use them, and once in a process.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron_deepstack.errors import ConfigError

_BASE = "transformer_engine.pytorch.module.base"


def make_user_buffers(tokens: int, width: int, tensor_ranks: int, *, fp8: bool) -> None:
    """Make the buffers. Collective over all ranks.

    Args:
        tokens: Tokens of a micro-batch on the ranks of one tensor-parallel group together.
        width: Width of hidden states.
        tensor_ranks: Size of the tensor-parallel axis; ranks of one group follow each other.
        fp8: Whether matrix products are computed in 8 bits.

    Raises:
        ConfigError: Transformer Engine cannot make them on this machine.
    """
    base: Any = importlib.import_module(_BASE)
    modes = getattr(base, "UserBufferQuantizationMode", None)
    kind = {"use_fp8": fp8} if modes is None else {"quantization_modes": [modes.FP8 if fp8 else modes.NONE]}
    try:
        base.initialize_ub(shape=[tokens, width], tp_size=tensor_ranks, bootstrap_backend="nccl", **kind)
    except RuntimeError as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            [f"speed.tp_overlap: Transformer Engine cannot make its buffers: {said}; or set speed.tp_overlap=never"]
        ) from error
