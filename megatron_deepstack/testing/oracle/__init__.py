"""The oracle: DeepStack's mathematics in plain torch on one process, without Megatron.

The one idea: every parallel layout is compared with code that has no layout. It is written to be read beside the paper
(arXiv 2406.04334), not to be fast: one sample at a time, no padding, attention written out. It shares no code with the
model under test, and works in whatever dtype the weights have, so that float64 weights give a result without visible
rounding.

Begin with `model.py`; `vision.py`, `stacks.py` and `language.py` are its parts.
"""

from megatron_deepstack.testing.oracle.model import OracleSample, oracle_forward, oracle_loss

__all__ = ["OracleSample", "oracle_forward", "oracle_loss"]
