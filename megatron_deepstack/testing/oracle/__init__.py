"""The oracle: DeepStack's mathematics in plain torch on one process, without Megatron.

Every parallel layout is compared with it. It is written to be read beside the paper (arXiv 2406.04334), not to be
fast: one sample at a time, no padding, attention written out. It shares no code with the model under test, and works
in whatever dtype the weights have, so float64 weights give a float64 truth.
"""

from megatron_deepstack.testing.oracle.model import OracleSample, oracle_forward, oracle_loss

__all__ = ["OracleSample", "oracle_forward", "oracle_loss"]
