"""Verbs of a job on a Ray cluster: launch, status, stop."""
