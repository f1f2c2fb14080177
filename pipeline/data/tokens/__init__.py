"""Stages `tokenizer` and `tokenize`: train a tokenizer, encode and pack documents into token tars with an index.

In: `documents`, `executor`, `pipeline.tokenizer`, and the tokenizer and tokens sections of a configuration.
Out: tokenizer.model, tokens/*.tar and index.json; `TokenIndex` for everything that reads them.
"""
