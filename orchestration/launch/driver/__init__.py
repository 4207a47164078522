"""The driver of a launched run, and the other shells that watch or stop it.

The one idea: the driver writes what it knows into the run folder, so that `status` and `stop` work from any shell that
sees the folder, also when the driver is gone.

Begin with `run`, then `record`.
"""
