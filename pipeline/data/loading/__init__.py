"""Token shards to micro batches: the data order, checked reads with a cache on each node, and read-ahead.

In: a `TokenIndex` (local or at a URL), seed, batch sizes, rank and world size.
Out: `TrainLoader` and `TokenReader`; the only state is the position in the order.
"""
