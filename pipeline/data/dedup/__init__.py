"""Duplicates over the whole corpus: exact, near and repeated paragraphs, found from sorted tables on disk.

In: datatrove documents with ordinals; `executor` for task records, `pipeline.io` for files.
Out: datatrove blocks that write keys, find duplicates and drop or cut them.
"""
