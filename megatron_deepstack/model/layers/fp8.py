"""FP8 through Transformer Engine: the decoder's linears multiply in 8 bits, everything else stays bf16.

Parameters are bf16 with float32 main copies, as without FP8. Megatron-Core without Transformer Engine, or with its
local layers, ignores its own FP8 settings and trains in bf16 silently, so what is missing is an error here.
"""

from __future__ import annotations

from megatron_deepstack.config.choices import Fp8Scaling, Layers, Precision
from megatron_deepstack.errors import ConfigError
from megatron_deepstack.platform.compute.device import compute_capability, device_name
from megatron_deepstack.platform.compute.transformer_engine import engine_problem, unavailable

_LEAST_CAPABILITY = {
    Fp8Scaling.TENSORWISE: (8, 9),
    Fp8Scaling.DELAYED: (8, 9),
    Fp8Scaling.BLOCKWISE: (9, 0),
    Fp8Scaling.MXFP8: (10, 0),
}
"""First CUDA compute capability that has the scaling's tensor cores: Ada, Hopper, Blackwell."""
_QUESTIONS = {
    Fp8Scaling.TENSORWISE: "is_fp8_available",
    Fp8Scaling.DELAYED: "is_fp8_available",
    Fp8Scaling.BLOCKWISE: "is_fp8_block_scaling_available",
    Fp8Scaling.MXFP8: "is_mxfp8_available",
}
"""Transformer Engine's own functions. They know more than the generation: blockwise needs CUDA 12.9, and GPUs of
capability 12 lack some products of MXFP8."""
_GENERATIONS = {(8, 9): "Ada (L4, L40S)", (9, 0): "Hopper (H100, H200)", (10, 0): "Blackwell (B200)"}


def fp8_settings(precision: Precision, scaling: Fp8Scaling) -> dict[str, object]:
    """The fields of Megatron's TransformerConfig about FP8.

    Scalings of whole tensors take e5m2 for gradients, whose range is wider; scalings of small blocks take e4m3 for all.
    Delayed scaling looks back over 1024 steps, as Transformer Engine's own default does and Megatron's does not.

    Args:
        precision: The recipe's `train.precision`.
        scaling: The recipe's `train.fp8_scaling`.

    Returns:
        The fields by name; none except for the precision `fp8`.
    """
    if precision is not Precision.FP8:
        return {}
    of_tensors = scaling in (Fp8Scaling.TENSORWISE, Fp8Scaling.DELAYED)
    settings: dict[str, object] = {"fp8": "hybrid" if of_tensors else "e4m3", "fp8_recipe": scaling.value}
    if scaling is Fp8Scaling.DELAYED:
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def require_fp8(precision: Precision, scaling: Fp8Scaling, layers: Layers) -> None:
    """Check that this rank can compute in FP8, if the recipe wants it. Not collective.

    Args:
        precision: The recipe's `train.precision`; nothing is checked except for `fp8`.
        scaling: The recipe's `train.fp8_scaling`.
        layers: The recipe's `model.layers`.

    Raises:
        ConfigError: This rank cannot; all that is missing is named.
    """
    if precision is not Precision.FP8:
        return
    missing = []
    least, capability = _LEAST_CAPABILITY[scaling], compute_capability()
    if capability < least:
        have = f"{device_name()} of compute capability {capability[0]}.{capability[1]}" if any(capability) else "no GPU"
        missing.append(f"a GPU of {_GENERATIONS[least]} or later for fp8_scaling {scaling}; found {have}")
    problem = engine_problem()
    if problem is not None:
        missing.append(f"Transformer Engine, and {problem}")
    elif capability >= least and (reason := unavailable(_QUESTIONS[scaling])) is not None:
        missing.append(f"what fp8_scaling {scaling} needs of Transformer Engine, which says: {reason}; choose another")
    if layers is Layers.LOCAL:
        missing.append("Transformer Engine's layers; model.layers is `local`")
    if missing:
        raise ConfigError([f"train.precision: fp8 needs {what}, or use bf16" for what in missing])
