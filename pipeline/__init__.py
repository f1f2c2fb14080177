"""From a corpus to a certified, cached inference bundle: data, training and post-training stages.

In: a `RunConfig`; below it only `pldr_model`. Which package may import which: `[tool.importlinter]` in pyproject.toml.
Out: run directories, and the functions that `launch` calls.
"""
