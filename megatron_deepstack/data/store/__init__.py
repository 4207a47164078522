"""The store: its layout, the only writer and the only reader of its arrays, in a folder or in a bucket.

The one idea: a store is a zarr v3 group that any zarr reader opens. Every view is one chunk, so a rank reads only the
views that it needs; everything else is small flat index arrays.

Begin with `schema.py` (the layout), then `reader.py` (`Store`) and `writer.py`. `shards.py` reads the views of local
stores, and the folder `url` those of stores behind a URL.
"""
