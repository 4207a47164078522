"""One training step: encode, route, schedule, route back.

The one idea: the encoder and the pipeline are two computations that meet twice. Before the schedule all rows are
encoded and sent to the ranks that add them; after it all their gradients come back, and the encoder's backward runs. So
Megatron-Core's schedules run unchanged between the two. The placement `inline`, a baseline, encodes inside the first
stage instead.

    train_step        the whole step: begin here
    engine            what it works on: modules with their gradient buffers, and groups
    encode, inline    the encoder's passes, outside the schedule or inside it
    visual            from received rows to what each chunk adds, and back to gradients
    schedule          Megatron's schedules, driven with the step's micro-batches
    clock, timeline, work
                      where the time goes, in sums and one by one
"""
