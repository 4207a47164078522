"""Files to start runs with: KubeRay, Slurm with and without Ray, and `ray job submit`; a test reads each of them.

The one idea: they are templates, to be copied and edited, so names, images, sizes and paths in them are those of an
example. `kuberay` is the command that the KubeRay job runs, which turns the end of a run into an end that Kubernetes
understands. Begin with docs/cluster.md, which shows the use of each.
"""
