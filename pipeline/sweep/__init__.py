"""A grid of runs, one after another, with one table and one plot of what came out: `pldr sweep`.

In: a sweep's YAML, and the configuration that it varies. Runs each child through `pipeline.stages`; reads `pipeline.tracking`.
Out: `report/sweep.json` and `sweep.html`, also attached to the children's parent run in MLflow.
"""
