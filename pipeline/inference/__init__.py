"""What is done with a trained model: open it, generate and score text, export it, serve it with MLflow, register it.

In: a bundle folder, an export, or the finished stages of a run (`source`). Imports `bundle`, `config`, `errors`, `tokenizer`,
`pldr_model` and MLflow; no other floor.
Out: completions, log-probabilities, exports, a pyfunc model for MLflow, and a registered model version with its lineage.
"""
