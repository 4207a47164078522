"""What a job reads: files of records, their paths, and reading them ahead."""
