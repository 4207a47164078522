"""Arithmetic before any process starts: what a recipe and a sample's metadata determine.

The one idea: every rank computes the same plan from the same small numbers, so ranks agree without exchanging a word.
All functions are pure, take values and return values, and know neither files nor devices nor torch.

    views, samplers, rows    which views an image has, and which token of which view becomes which row of which stack
    slots, vit_stacks        before which layer each stack is added, and which stage holds that layer
    sequence, packing        a sample's place in a micro-batch
    routes, step_plan        which rank encodes which view, and where each row travels
    linears, cost, footprint sizes of matrices, FLOPs of a step, bytes of a run
    check                    what the plan and the number of ranks demand of a recipe

Begin with `rows`: `image_rows` is the paper's sampling, and everything after it only moves these rows.
"""
