"""What a checkpoint holds, and what a run that reads it must have in common with it.

The one idea: the state is described to Megatron as sharded tensors under names that do not depend on the layout, and a
run goes on only from a checkpoint of the same model, data and seed.

Begin with `state`, then `identity`.
"""
