"""Writing a checkpoint beside training, and committing it whole.

The one idea: training waits only for the copy of its tensors to host memory. A process beside each rank writes the
files, and rank 0 gives the folder its name when all ranks have finished.

Begin with `saver`, then `background` and `commit`.
"""
