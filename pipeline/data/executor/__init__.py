"""Running datatrove pipelines as restartable tasks: local processes, Slurm arrays or a Ray cluster.

In: lists of datatrove steps, `data.executor` and its settings, `pipeline/data/tar.py`, `pipeline.io`.
Out: `run_tasks`, the tasks' records and step statistics, and progress.
"""
