"""Parallelism: which rank has which place, the process groups, and reductions over them.

The one idea: ranks lie on four axes (tp, cp, dp, pp), and the tp x cp x pp ranks with one dp index form a replica,
which works on the same samples. Megatron creates the groups of these axes; this package adds those of a replica and of
the encoder. The project's own all-reduces are only here (and in `testing`), and each function says which ranks must
call it.

    axes, groups             the place of a rank as arithmetic, and its process groups
    reduce, agree, context   sums over ranks, errors that all ranks raise together, gathering a sequence over cp
    host_clock, link         a common time for all ranks, and a test of the link between two machines

Begin with `axes`, which needs no process group, and then `groups.create_groups`.
"""
