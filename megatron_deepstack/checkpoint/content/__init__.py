"""What a checkpoint holds, and what a run that reads it must have in common with it."""
