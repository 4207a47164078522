"""The trial of a machine with a GPU: what it can do, whether results are right there, and how fast a 7B stage is.

`catalogue` lists the parts in the order in which they run, `runner` starts each in a process of its own with its own
deadline, and `process` is that process. A part is one module with a function `run(settings, report)`; it reports rows
as it goes, so that what was measured before a crash or a deadline is kept. `tools/gpu_trial.py` is the command.
"""
