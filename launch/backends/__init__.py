"""How ranks are started: DeepSpeed's launcher, torchrun, Slurm, Kubernetes, and one `pldr` process on every node.

In: a checked configuration from `pipeline`, plain values from `launch.commands`, and `report`, which prints a line.
Out: functions that start a training job and wait for it, or submit it to a scheduler.
"""
