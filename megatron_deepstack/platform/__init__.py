"""What the machine offers: devices, processes, files, and output for people.

The one idea: everything that depends on the machine or the operating system is here, and nothing here knows the model,
so the same code runs with GPUs and without any. Only this package uses `torch.cuda`.

    compute            device, host memory, random state, and Megatron-Core on a CPU
    processes          starting ranks, joining `torch.distributed`, and ending them together
    files              files that are complete or absent, locks, free space
    network            the interface that has an address
    progress, quantity numbers and progress, written for people

Begin with `compute.device`.
"""
