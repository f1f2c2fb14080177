"""From corpora to batches: cleaned documents, the tokenizer, token shards, and the loader that reads them in a fixed order.

In: `data.*`, `tokenizer.*` and `tokens.*` of a configuration, and the files that `data.sources` names.
Out: documents/, tokenizer/ and tokens/ of a run, data reports, and micro batches for `pipeline/stages`.
"""
