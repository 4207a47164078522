"""Which samples a step trains on, and what a rank reads for it."""
