"""The visual encoder: a tower, its stacks, and the projector.

The one idea: every rank holds the whole encoder and encodes some of the views, so it is neither split nor part of a
stage. It maps pixels to rows, one view after another; which row goes where is planned elsewhere.

Begin with `encoder.py`. `views.py` is what it reads; `tower.py` says what a tower must offer, `vit.py` is the tower for
views of one size, and `native.py` the one for views of any size. `qformer.py` is another projector.
"""
