"""ViT, projector, stacking, injection and language model, built on Megatron-Core's layers.

The one idea: stacks never travel through the pipeline's messages. A chunk of the decoder gets the rows that its own
layers add as an argument, which Megatron's blocks hand to every layer unchanged, and a subclass of one layer adds
them (`injection`). The encoder maps pixels to rows and knows nothing of sequences or stages.

    build             everything one rank holds: where to begin
    vision            tower, projector and newline: pixels to rows
    language          a chunk of the decoder, from tokens to hidden states or losses
    layers            what a transformer layer is made of, `injection` among it
    weights, rules    which published tensors a parameter is made of, and how
    published_shapes  every published tensor of a model
    init              what parameters start from

Which parts a tower or a family has is asked of their entries in `config.traits`.
"""
