"""What a job reads: files of records, their paths, and reading them ahead.

The one idea: records are read as a stream, and all paths that are missing are reported together.

Begin with `inputs`.
"""
