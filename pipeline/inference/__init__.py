"""What is done with a bundle: generate text, serve it with MLflow, register it as a model version.

In: a bundle folder, verified and loaded by `bundle`. Imports `bundle`, `errors`, `tokenizer`, `pldr_model` and MLflow; no
other floor.
Out: completions, a pyfunc model for MLflow, and a registered model version with its lineage.
"""
