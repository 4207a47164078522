"""The demo's task: pages with a number printed too small for the global view, and questions about it.

The one idea: the number can be read in the crops but not in the global view, so a model that answers correctly has used
the stacks. Begin with `draw.py` (the verb `draw`); `page.py` composes and paints one page, and `vocabulary.py` trains a
small tokenizer.
"""
