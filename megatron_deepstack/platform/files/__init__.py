"""Files and folders of a run: complete or absent, locked, and checked for free space before work begins.

The one idea: a process may be killed and a disk may become full at any moment, and then another process must find
either the old state or the new one, never a part of it. So files are written beside their place and renamed, and locks
are of a kind that the kernel releases when their holder dies.

Begin with `write_whole`. `run_lock` and `run_disk` protect a run folder, and `scratch` makes temporary folders.
"""
