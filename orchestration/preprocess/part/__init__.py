"""Parts, the unit of work: planned, worked on, recorded, and put together at the end.

The one idea: a part's commit record is created once and never replaced; the parts that have one are done.

Begin with `parts`, then `work`, `ledger` and `finalise`.
"""
