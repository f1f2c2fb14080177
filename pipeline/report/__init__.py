"""HTML pages: rendering, styles, plots and histograms, and the training report.

In: plain values from other packages; `pipeline.io` to write files.
Out: self-contained HTML pages without scripts.
"""
