"""New stores from finished ones, without decoding an image.

The one idea: a shard whose images are all kept is linked or copied as it is, and only the others are put together from
their chunks. Begin with `regroup.py` (which image goes into which shard; pure), then `assemble.py`, which writes.
`merge.py` and `split.py` are the two verbs.
"""
