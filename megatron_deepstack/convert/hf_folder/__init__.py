"""Code that exports carry with them, so that transformers loads and runs DeepStack models without this package.

The one idea: an exported folder needs nothing of ours. So these files import transformers, torch, numpy and Pillow
only, and each other by relative names, since transformers copies them to a place of its own. They are never imported by
the rest of this package; `convert.export` copies them.

    configuration_deepstack   what config.json says
    vision_deepstack          the vision tower, and how crops become stacks
    modeling_deepstack        the model: begin here
    processing_deepstack      images to views, and prompts with placeholders
"""
