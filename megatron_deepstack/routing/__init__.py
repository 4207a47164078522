"""Rows to ranks and gradients back: the only point-to-point and all-to-all calls of the project."""
