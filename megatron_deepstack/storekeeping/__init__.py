"""Work on finished stores: verify, show, count, merge and split them (the verbs `store ...`).

The one idea: nothing here decodes an image or changes a finished store; a new store is written beside the old ones.
Begin with `verify.py` (what makes a store whole); `show.py` and `stats.py` present a store, `rewrite` makes new ones,
and `choose.py` reads the arguments that these verbs share.
"""
