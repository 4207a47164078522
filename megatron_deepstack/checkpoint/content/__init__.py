"""What a checkpoint holds, and what a run that reads it must have in common with it.

Tensors are named by their place in the whole model, not by the rank that holds them. So a run with another layout can
read them. `state` describes weights and optimizer states, `random_state` the random generators of each rank, and
`identity` the facts that must be equal in both runs. Begin with `state.sharded_state`.
"""
