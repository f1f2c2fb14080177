"""What a configuration costs on a cluster, computed: communication, memory, files, failures, the best way for each size.

Pure functions of a RunConfig and a Cluster; `pldr plan CONFIG --devices 1024 --gpus-per-node 8 …` prints them. Formulas and
sources, and what is not modeled: docs/scale.md.
"""
