"""Saving and resuming: Megatron's distributed checkpoints, committed atomically and checked on the way back.

The one idea: a checkpoint is whole or not there. It is written under a temporary name, checksummed while it is written,
and renamed at the end; any layout reads the checkpoint of any other.

Begin with `folder` (names and checksums), then `saving` (the way out) and `load` (the way in).
"""
