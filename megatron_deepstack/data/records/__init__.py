"""Records: conversations about images, from JSON, JSON lines and tar shards.

The one idea: every record is checked before any work starts, and nothing that a record holds is dropped silently. Begin
with `record.py` (one checked record), then `dialects.py` (the formats that are understood). `record_files.py` and
`tar_shards.py` read the two kinds of files.
"""
