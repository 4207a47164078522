"""The visual encoder: a tower, its stacks, and the projector."""
