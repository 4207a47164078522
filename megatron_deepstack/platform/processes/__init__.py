"""Processes: starting ranks, joining `torch.distributed`, ending ranks together, and identifying a process.

The one idea: ranks depend on each other, so they start together and end together, and the user sees the error of the
rank that caused a failure instead of those of the ranks that lost their connection to it.

Begin with `local_ranks.launch_ranks`, which starts ranks on this machine, and `process_group.join`, which each of them
calls. `owner` and `process` tell whether a process that wrote down its id still runs.
"""
