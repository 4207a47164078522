"""Samples to micro-batches: placeholders opened up, packs, padded lengths, and a rank's step as a whole."""
