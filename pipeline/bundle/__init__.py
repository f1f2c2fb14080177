"""The bundle's format, reading and verifying it.

In: a bundle folder on disk. Imports `config`, `io`, `tokenizer` and `pldr_model`; never a floor (`post` writes bundles).
Out: `read_bundle` and `verify_bundle` for `inference` and the command line, names and tensors of the format for `post`.
"""
