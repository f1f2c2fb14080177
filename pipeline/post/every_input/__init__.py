"""Every input there is: G_LM of a layer as a function of the rows of its density matrix, searched for the worst.

The metric learner sees nothing of an input but single normalised rows, K numbers each with mean 0 and norm <= sqrt(K). So all
inputs of all lengths are points of one ball per layer.
In: a model and its cached G_LM. Imports `distributed` and `pldr_model`; reads and writes no files.
Out: plain numbers; nothing is judged here.
"""
