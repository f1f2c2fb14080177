"""Source files to documents: find the files, cut them into units, read each unit in bounded memory.

In: the `data.sources` entries, `pipeline.io`, `pipeline.errors`.
Out: `InputFile`, `Unit`, and per unit a stream of `Text` or `Rejected`.
"""
