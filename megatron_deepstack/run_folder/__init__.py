"""A run folder, read back: the recipe with its paths as the run meant them, and the answers kept by store.

Begin with `recipe.recipe_of_run`, which every verb that takes a RUN calls, and `answers.read_answer_sets`.
"""
