"""A model for lmms-eval, the evaluation harness: `--model megatron_deepstack --model_args run=RUN`.

The one idea: lmms-eval finds `manifest.py` by its entry point, and `model.py` drives the ranks of a run in the
background, so that the harness itself sees neither Megatron nor ranks. Neither is imported unless lmms-eval asks.
Begin with `model.py`.
"""
