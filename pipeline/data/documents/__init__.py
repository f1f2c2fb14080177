"""Stage `shard`: corpora to cleaned, deduplicated document tars with an index, and reading them back.

In: `readers`, `filters`, `dedup`, `executor`, and the data section of a configuration.
Out: documents/{train,val,test}-*.tar, removed/*.jsonl.zst and index.json; `DocumentIndex` for everything that reads them.
"""
