"""Images to views: find a file, decode it without trusting it, resize it and cut it.

The one idea: an image file may come from anywhere, so a separate process decodes it. A file that crashes or blocks the
decoder is put into quarantine, and the job goes on.

Begin with `processor.py` (what decides the pixels) and `pictures.py` (from bytes to views); `decoder.py` runs them in
the separate process.
"""
