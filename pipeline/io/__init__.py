"""Files, local or at fsspec URLs: atomic writes, checksums, retries, and safetensors files.

In: paths, URLs and bytes; `pipeline.errors` only.
Out: published files, or a one-line `UserError` that names the file.
"""
