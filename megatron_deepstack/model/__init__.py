"""ViT, projector, stacking, injection and language model, built on Megatron-Core's layers.

The one idea: stacks never travel through the pipeline's messages. A chunk of the decoder gets the rows that its own
layers add as an argument, which Megatron's blocks hand to every layer unchanged, and a subclass of one layer adds
them (`injection`). The encoder maps pixels to rows and knows nothing of sequences or stages.

    build            everything one rank holds: where to begin
    encoder          tower, projector and newline: pixels to rows
    tower, vit       what a tower must offer, and the usual one
    language         a chunk of the decoder, from tokens to hidden states or losses
    rotary           its positions
    injection        the layer that adds rows
    specs            which classes layers are made of; `attention`, `norm`, `lora` are such classes
    megatron_config  the recipe in Megatron's words; `fp8` is a part of it
    weights, rules   which published tensors a parameter is made of, and how
    init             what they start from

Which parts a tower or a family has is asked of their entries in `config.traits`.
"""
