"""What the machine offers: device, backend, random state, and Megatron-Core's CUDA assumptions on a CPU."""
