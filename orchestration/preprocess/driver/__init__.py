"""The driver of a job: checks, the lease, tasks in flight, progress, the end.

The one idea: check everything that can be checked first, keep a window of tasks in flight, and write `complete` last.

Begin with `run`, then `tasks`.
"""
