"""What learns and how: parameter groups, AdamW, learning rate, steps left out.

The one idea: decoder and encoder have optimizers of their own, since their gradients are reduced over different ranks,
but one gradient norm and one decision whether the step is applied.

Begin with `optimizer`, then `groups`.
"""
