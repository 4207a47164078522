"""From samples to micro-batches: expanded sequences, packs, padded lengths, and the plan of a rank's step.

The one idea: lengths alone determine the layout of a batch, so every rank computes it for itself with the same result.

Begin with `sequence.expand`, which puts an image's visual tokens into a sample. Then `dealing` divides a step's samples
among replicas and micro-batches, `packing` joins several samples to one sequence, and `step_plan.plan_step` makes all
that a rank needs for a step.
"""
