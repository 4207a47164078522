"""What a transformer layer is made of: attention, norms, injection, adapters, FP8, and Megatron's specs of them."""
