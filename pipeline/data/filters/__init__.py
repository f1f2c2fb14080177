"""Cleaning one document at a time: Unicode repair, length, language, quality, decontamination.

In: datatrove documents and `data.clean.*`; readers for evaluation files and word hashes from `dedup`.
Out: datatrove blocks, chosen and ordered by chain.py.
"""
