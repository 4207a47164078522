"""The trial of a machine with a GPU: what it can do, whether results are right there, and how fast a 7B stage is.

The one idea: a machine is often lent for minutes, so nothing that was measured may be lost. Each part of the trial runs
in a process of its own with its own deadline, and reports a row as soon as it knows it, so a crash or a deadline costs
one part only.

A part is one module with a function `run(settings, report)`. Begin with `catalogue.py`, which lists the parts in the
order in which they run; `runner.py` starts them, `process.py` is such a process, and `report.py` is what parts get and
what they write. `tools/gpu_trial.py` is the command.
"""
