"""Saving and resuming: Megatron's distributed checkpoints, committed atomically and checked on the way back.

A checkpoint is written into a folder with the ending `.partial`. It gets its final name only when every file and the
manifest with sizes and checksums are on the disk, so a folder with a final name was written to the end.
`folder` describes the files on the disk, `saving` writes them, `load` reads them, and `content` says what they hold.
Begin with `saving.saver.Saver` and `load.load`.
"""
