"""Computing on this machine: device, host memory, random state, and Megatron-Core on a CPU.

The one idea: each question about the GPU is asked once, here, and has an answer for the CPU as well, so callers contain
no special case for either. `megatron_cpu` gives Megatron-Core the same on machines without a GPU.

Begin with `device`: `select_device` is the first call of every rank.
"""
