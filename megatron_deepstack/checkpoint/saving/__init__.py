"""Writing a checkpoint beside training, and committing it whole.

Each rank copies its tensors to shared host memory, and a process of its own writes them to the disk while training
goes on. When all ranks have written, one commit turns the partial folder into a checkpoint and old ones are deleted.
Begin with `saver.Saver`; `plan` decides what each rank writes and `commit` completes the folder.
"""
