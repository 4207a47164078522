"""The training loop: optimizer, learning rate, metrics, resuming.

The one idea: whatever one rank alone may see (a signal, a gradient that is not finite, a sample that cannot be read) is
agreed on by all ranks first, so that all ranks do the same and none waits for one that has left.

Begin with `main` (how a rank enters), `session` (the phases of a start), then `loop` (the steps).
"""
