"""Saving and resuming: Megatron's distributed checkpoints, committed atomically and checked on the way back."""
