"""A trained run at work: answers to held-out questions with their score, and exported weights.

The one idea: answers come from the same forward pass as training, in any layout of ranks. Begin with `launch.py` (the
verb `generate`), then `main.py` (what one rank does) and `generate.py` (how an answer is made). `questions.py` reads
questions from a store, and `export.py` is the verb `export`.
"""
