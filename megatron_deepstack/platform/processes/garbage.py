"""Python's collector of reference cycles, which is told to ignore objects that never become garbage."""

from __future__ import annotations

import gc


def settle() -> None:
    """Exclude all objects that exist now from later collections.

    Call it once per process, after all imports and before anything large is built. torch and Megatron create half a
    million objects, and each full collection would look at all of them. That takes 0.2 to 0.4 s, in each rank at a
    different step, and all other ranks wait for it.
    """
    gc.collect()
    gc.freeze()
