"""Drawings and pages as markup: charts, the stage plan, the timeline, the frame of a page.

The one idea: markup is built by `svg.element`, which escapes every text and attribute, so data cannot break a page.
Begin with `svg.py`, then `frame.py` (a whole page) and `chart.py`.
"""
