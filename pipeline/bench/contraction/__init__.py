"""What makes G_LM constant, from weights and from configurations, beside what was measured.

In: run directories of sweeps and runs: checkpoints, held-out tokens, what MLflow has of their validations.
Out: `python -m pipeline.bench.contraction` predicts the deviation of A from the weights of each checkpoint (units.py, runs.py);
`python -m pipeline.bench.contraction.law` fits the constants of pipeline/config/contraction.py and judges it beside the budget.
"""
