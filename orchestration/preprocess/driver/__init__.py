"""The driver of a job: checks, the lease, tasks in flight, progress, the end."""
