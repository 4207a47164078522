"""`doctor`: what this machine offers and lacks. `host` looks, `probe` tries heavy things in processes of their own.

The one idea: each look at the machine is a finding with a state and an advice; what may crash or hang is looked at in a
process of its own with a deadline.

Begin with `examine`.
"""
