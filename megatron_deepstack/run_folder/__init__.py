"""Reading a run folder back: its recipe, and the answers that the model gave, kept by store.

The one idea: a run folder is enough to work with a run, from any current folder and after it was moved. So the paths in
the recipe are returned as the run meant them, and each answer names the store that its question came from.

Begin with `recipe.recipe_of_run`, which every command that takes a RUN calls, and `answers.read_answer_sets`. The names
of the files in a run folder are in `config.run_folder`.
"""
