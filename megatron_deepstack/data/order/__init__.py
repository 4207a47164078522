"""Which samples a step trains on, and what a rank reads for it.

The one idea: the order is a pure function of seed and step, so a resumed run needs no saved state of its data, and no
layout of ranks changes the order. Begin with `sampler.py`, then `steps.py`, which gives a rank its step; `mixture.py`
joins several stores, and `opening.py` opens what a recipe names.
"""
