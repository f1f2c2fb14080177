"""Packaging: writing a bundle, its model card, and measuring what a smaller weight format costs.

In: a model, its G_LM, its certificate, a tokenizer, held-out sequences. Imports `bundle`, `io` and `post/measure`.
Out: a verified bundle folder, byte-identical for identical inputs.
"""
