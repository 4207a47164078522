"""`evaluate`: the questions of a store or of a file are answered by the ranks of one or several replicas, and scored.

The one idea: replicas divide the questions, and the scores of a question depend on its answer alone.
Begin with `launch.py` (the verb), then `exam.py` (where questions come from) and `rank.py` (what one rank does).
"""
