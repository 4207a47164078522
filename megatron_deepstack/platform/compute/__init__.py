"""Device, host memory, random state, and Megatron-Core's CUDA assumptions on a CPU."""
