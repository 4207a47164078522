"""The driver of a launched run, and the other shells that watch or stop it."""
