"""Variants and grids of runs, with one table, the variants' comparison and plots of what came out: `pldr sweep`.

In: a sweep's YAML, and the configuration that it varies. Runs each child through `pipeline.stages`; reads `pipeline.tracking`.
Out: `report/sweep.json` and `sweep.html`, also attached to the children's parent run in MLflow; from such files alone pages
and Markdown over several sweeps (page.py).
"""
