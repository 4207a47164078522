"""Stores behind a URL: arrays read in blocks, views as byte ranges, and one bounded cache for all of it.

The one idea: training reads in random order, so only what is needed is fetched, and every copy counts towards one limit
per node (`data.cache_gib`). Begin with `remote.py` (views and small arrays); `remote_array.py` reads large index
arrays, and `cache.py` is the folder of copies.
"""
