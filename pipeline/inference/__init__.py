"""What is done with a trained model: open it, generate and score text, export it, evaluate it, serve it, register it.

In: a bundle folder, an export, or the finished stages of a run. Imports `bundle`, `config`, `tracking`, `report` and what is
below them; no other floor.
Out: completions, log-probabilities, exports, benchmark scores, answers over HTTP, and a registered model version.

Read `source` first: it opens any of the three as one `OpenModel` (`opened`). Then `runtime` (text: `request` -> tokens ->
`completion`) and `scoring` (log-probabilities; `grouping` makes its batches). All else uses these: `hf/` exports to
transformers and vLLM, `evaluate/` runs benchmarks, `serve/` is the HTTP server and its page; `mlflow_model` (with
`parameters`), `logged_model` and `register` are for MLflow. `extras` names a package that is missing.
"""
