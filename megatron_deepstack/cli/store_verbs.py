"""Verbs about a finished store: `store verify`, `show`, `stats`, `merge`, `split`."""
