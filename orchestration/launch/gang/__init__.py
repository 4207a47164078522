"""The gang of ranks as Ray Train runs it: its start, its end, and whether it starts again."""
