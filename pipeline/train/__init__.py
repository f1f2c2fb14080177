"""Token shards to committed checkpoints: the DeepSpeed engine, the loop, and what it measures."""
