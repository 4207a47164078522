"""The gang of ranks as Ray Train runs it: its start, its end, and whether it starts again.

The one idea: when a rank ends, what it said last decides whether the gang starts again; the decision is a pure
function.

Begin with `policy`, then `callback` and `rank`.
"""
