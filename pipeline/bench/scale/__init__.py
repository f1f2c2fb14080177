"""Does `pldr plan` predict what two ranks do over a slow link? `python -m pipeline.bench.scale` (root, iproute2).

In: sizes, and the link's rates. Out: for each ZeRO stage and rate the predicted and the measured step, and the bytes that
crossed the link against those of the model (pipeline/config/scale/communication.py).
"""
