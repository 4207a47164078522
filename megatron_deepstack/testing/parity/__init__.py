"""`check-parity`: a Hugging Face folder through transformers and through this system, on inputs that are drawn.

The one idea: transformers computes every sample by itself, on one process and in float64, and this system computes all
of them at once, in the asked layout and in float32. What differs by more than rounding is a fault of one of them.

    drawn           samples: text, pictures of different shapes, frame pairs of a video
    by_transformers what transformers makes of them: logits, loss, gradients
    on_ranks        one rank's part: the same by this system, compared
    check           the whole, and its lines

Begin with `check.check_folder`.
"""
