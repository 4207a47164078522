"""What a transformer layer is made of: attention, norms, injection, adapters, FP8, and Megatron's specs of them.

The one idea: Megatron-Core's own layers are built, and what differs is one class in their specs, such as a subclass of
a layer or a linear. None of Megatron's classes is copied.

    specs            which classes a layer of the decoder or of the tower is built from: begin here
    megatron_config  the recipe as Megatron's configuration; `fp8` is a part of it
    injection        the layer that adds rows to the hidden states
    attention        core attention without Transformer Engine, and packed rows
    key_value_cache  the same for generation, with the keys and values of earlier tokens
    rotary           angles of positions
    norm, residual, activation, gated, lora
                     parts that some families or recipes want
    speed            which fusions and overlaps a run uses
"""
