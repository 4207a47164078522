"""Weights from other programs to ours, and ours to theirs.

The one idea: inside, every tensor has its *published* name, that of the DeepStack and LLaVA releases. A checkpoint of
any other naming is read by renaming its tensors to that (`hf_names`), an export by renaming them back. What a
checkpoint computes is told by its config.json, and is compared with the recipe key by key (`hf_config`) before a
tensor is read.

    published      checkpoints on disk as the source of published tensors: where reading begins
    export         a whole model written for others to load: where writing begins
    hf_config      is what this config.json describes what the recipe computes?
    hf_facts       the recipe's numbers in Hugging Face's words
    hf_written     the config.json of an export
    hf_names       names of tensors, both ways
    tensor_files   safetensors and PyTorch files

Which keys and names a tower or a decoder family has at Hugging Face stands with the rest of what it is, in
`config.traits`.
"""
