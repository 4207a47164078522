"""From records and images to a store: a plan of parts, workers that write them, a ledger that says which are done.

The one idea: a job is a list of parts that is a pure function of recipe, records and tokenizer. A part writes its files
once and the same bytes each time, so a part may be repeated without harm.

Begin with `driver.run`, then `part.parts` and `part.work`.
"""
