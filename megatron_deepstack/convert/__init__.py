"""Weights from other programs to ours, and ours to theirs.

The one idea: inside, every tensor has its *published* name, which the DeepStack and LLaVA releases give it. A
checkpoint with other names is read by renaming its tensors to these (`hf_names`), and an export is written by renaming
them back. What a checkpoint computes stands in its config.json, which is compared with the recipe key by key
(`hf_config`) before a tensor is read.

    published         checkpoints on disk as the source of published tensors: begin here to follow reading
    exported_folder   a folder with its config as a model, without a recipe
    hf_whole_folder   how a folder of a whole model, such as Qwen3-VL, prepares pictures and prompts
    folders           `convert`: such a folder in another layout
    export            a whole model written for others to load: begin here to follow writing
    export_files      the files beside the weights
    adapters          LoRA adapters alone, as PEFT reads them
    hf_folder         code that an export brings, for transformers
    tokenizer_json    the tokenizer and `chat_template` the conversations, for transformers
    hf_config         does this config.json describe what the recipe computes?
    hf_facts          the recipe's numbers in Hugging Face's words
    hf_written        the config.json of an export
    hf_names          names of tensors, both ways
    hf_rope           keys about rotary positions and attention windows
    vocabulary        rows of placeholders and padding
    tensor_files      reading safetensors and PyTorch files, and `tensor_writer` writing them

The keys and names that a tower or a decoder family has at Hugging Face stand in `config.traits`, with the rest of what
it is.
"""
