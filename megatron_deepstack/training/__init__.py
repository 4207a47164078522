"""The training loop: optimizer, learning rate, metrics, resuming."""
