"""What a user asks for: the recipe, read and checked before anything starts.

A recipe is a tree of frozen dataclasses (`schema`), filled from YAML and `section.field=value` overrides (`load`,
which uses `build` for the strict part) and checked as a whole (`check`): all problems are found and reported at once,
each with the path of its field. Named answers are enums (`choices`), named sizes are in `architectures`, what named
things *are* is in the tables of `traits`, and numbers that follow from others are functions in `sizes`.

The one idea: what a run does follows from its recipe alone, so the resolved recipe, written beside every checkpoint, is
enough to repeat or continue it. Nothing here imports torch. Begin with `schema`.
"""
