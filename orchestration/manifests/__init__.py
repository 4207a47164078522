"""Files to start runs with: KubeRay, Slurm with and without Ray, and `ray job submit`; a test reads each of them."""
