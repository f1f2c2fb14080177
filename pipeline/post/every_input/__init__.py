"""Every input there is: all are points of one ball of rows per layer, which is searched for the worst and bounded.

In: a model and its cached G_LM. Imports `distributed` and `pldr_model`; reads and writes no files.
Out: plain numbers, the `worst_row` and `proof` of a certificate; nothing is judged here.
"""
