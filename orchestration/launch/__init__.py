"""Training on a Ray cluster: a placement, checks before the start, a gang of ranks that restarts, and its state.

The one idea: a launched run is the same `train` on each rank. What is added is a place for each rank, a look at every
node before the start, and a new start after a failure that is not a user's mistake.

Begin with `driver.run`, then `before.checks` and `gang.policy`.
"""
