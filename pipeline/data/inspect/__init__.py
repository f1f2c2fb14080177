"""Looking at finished data: verify checksums, show a sequence as text, write the data report.

In: the indexes and files of `documents` and `tokens`, `pipeline.report` for the page.
Out: results for `pldr data verify`, `show` and `report`; an HTML page.
"""
