"""The cost of a run before it starts: floating-point operations, memory, and sizes of linear layers.

The one idea: costs follow from the sizes in the recipe, so no model has to be built. What the layout computes in
addition, such as padding and recomputation, is not counted.

Begin with `linears`, the sizes of the matrices. `cost` counts operations from them, and `footprint` counts bytes.
"""
