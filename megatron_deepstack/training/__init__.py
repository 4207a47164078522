"""The training loop: optimizer, learning rate, metrics, resuming.

The one idea: whatever one rank alone may see (a signal, a gradient that is not finite, a sample that cannot be read) is
agreed on by all ranks first, so that each takes the same way and none waits for another that has left.

Begin with `main` (how a rank enters), `session` (the phases of a start), then `loop` (the steps).
"""
