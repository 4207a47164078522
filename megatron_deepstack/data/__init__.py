"""From records and images to a store, and from a store to samples.

The one idea: images are decoded, resized and cut once, before training, into a store (zarr arrays on a disk or at a
URL); training then only reads arrays. Everything here works with numpy and knows neither torch nor process groups (one
option, `data.resize: torch`, imports torch where it is used).

`records` reads conversations, `images` makes views of image files, `text` makes tokens, `store` writes and reads the
arrays, and `order` decides which samples a step trains on. Begin with `records/record.py`, then `store/reader.py`.
"""
