"""Planning: what a recipe and the sizes of samples determine before any process starts.

The one idea: every rank computes the same plan from the same small numbers, so ranks agree without communication. The
functions are pure: they take values and return values, and know neither devices nor torch. (Only `shipped` and
`check.load_checked_recipe` read files, which are recipes.)

    views       which views an image has
    slots       before which decoder layer each stack is added, and which stage holds that layer
    exchange    which token becomes which row, which rank encodes which view, and which rank adds each row
    batch       samples expanded, packed and padded to micro-batches
    budget      sizes of matrices, FLOPs of a step, bytes of a run
    check       what the plan and the number of ranks require of a recipe
    shipped     the recipes of the package

Begin with `exchange.rows`: `image_rows` is the sampling of the paper, and all later code only moves these rows.
"""
