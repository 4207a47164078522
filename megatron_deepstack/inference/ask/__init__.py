"""`ask`: pictures and a question in, an answer out, from a run or from an exported folder.

The one idea: a question is prepared by the process that the user started, exactly as preprocessing prepares samples,
and the ranks see only token ids and views. Begin with `launch.py` (questions and chat), then `preparation.py` (pixels
and prompts), `rank.py` (what the ranks do) and `text.py` (stop words, and text as it comes).
"""
