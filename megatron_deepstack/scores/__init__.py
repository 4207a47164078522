"""Scores of answers: metrics of one answer, evaluations of many, and how sure a difference is.

The one idea: a metric is a pure function from an answer and its references to a number, so that the same numbers come
from a run, a file or another program. Begin with `metrics.py`; `vqa_words.py` has the VQA challenge's normalisation,
`evaluation.py` the files of an evaluation, and `difference.py` the comparison of two.
"""
