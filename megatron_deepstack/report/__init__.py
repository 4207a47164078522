"""What a run did, for people: the stage plan in the terminal, and a self-contained HTML page.

The one idea: everything is read from the run folder, so a report can be made during a run, after it, and on another
machine. Begin with `page.py` (one run) and `compare.py` (several); `records.py` reads the metrics, `speed.py` and
`health.py` make sections of the page, `plan_text.py` and `plan_document.py` present the stage plan, and the folder
`drawing` holds all charts and drawings.
"""
