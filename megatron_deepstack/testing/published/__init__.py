"""Comparison with numbers of the published implementation.

The one idea: what the published code computed is the measure, so a *case* holds all of it: a tiny random model with its
weights, samples, logits, loss and gradients. `reference_case` reads one, `reference_rank` computes the same on the
ranks of any layout, and `reference` runs both for `check-reference`. `reference_data` compares views and token ids,
which must be equal.

Begin with `reference`.
"""
