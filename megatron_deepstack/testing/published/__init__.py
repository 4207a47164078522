"""Comparison with numbers of the published implementation.

A *case* is a tiny random model with its weights, samples, logits, loss and gradients, as the published code computed
them. `reference_case` reads one, `reference_rank` computes the same on the ranks of any layout, and `reference` runs
both for `check-reference`. `reference_data` compares views and token ids, which must be equal.
"""
