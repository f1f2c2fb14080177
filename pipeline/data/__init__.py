"""Corpora to documents, tokenizer, token shards; the order they are read in and the loader that reads
them."""
