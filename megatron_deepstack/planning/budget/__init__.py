"""The cost of a run before it starts: floating-point operations, memory, time, and numbers of parameters.

The one idea: costs follow from the sizes in the recipe, so no model has to be built. What the layout computes in
addition, such as padding and recomputation, is not counted as the model's own operations.

Begin with `linears`, the sizes of the matrices. `parameters` counts what ranks hold, `cost` operations, and `memory`
bytes; `load` says what a step consists of, `durations` what its parts take, and `run_plan` puts all of it together.
"""
