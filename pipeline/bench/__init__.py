"""Benchmarks behind `pldr bench`: decoding, training, the data path, scoring, a server, the start of the command line.

In: a configuration, text or a bundle; imports the floors that it times (`data`, `train`) and what they share.
Out: plain numbers, printed beside their limits; no test depends on them.
"""
