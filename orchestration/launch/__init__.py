"""Training on a Ray cluster: a placement, checks before the start, a gang of ranks that restarts, and its state"""
