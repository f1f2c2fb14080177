"""After training: consolidate the weights, extract G_LM, validate it, package the bundle.

In: a committed checkpoint and held-out tokens. Imports `checkpoint`, `bundle`, `report`, `config`, `io`; no other floor.
Out: `weights/`, `g_lm/`, the certificate with its page, and the bundle folder, which `inference` reads.
"""
