"""What a configuration costs on a cluster, computed: `pldr plan CONFIG --devices 1024 …`. Formulas and sources: docs/scale.md.

In: a RunConfig and a Cluster. Imports pldr_model/config.py, neither torch nor DeepSpeed.
Out: communication, memory, files, failures, and the best way to train on each number of devices, as plain values and lines.
"""
