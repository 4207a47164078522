"""Writing a checkpoint beside training, and committing it whole."""
