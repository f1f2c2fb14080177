"""Does `pldr plan` predict what two ranks do over a slow link? `python -m pipeline.bench.scale` (root, iproute2).

In: ZeRO stages and rates of the link; imports pipeline/train/ for the steps and pipeline/config/scale/ for what is predicted.
Out: for each stage and rate the predicted and the measured step, and the bytes that crossed the link against the model's.
"""
