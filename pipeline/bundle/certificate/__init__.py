"""The certificate's format: its schema, its checks, and the verdict as a function of the measures.

In: `certificate.json`, or measures and thresholds. Imports `config`, `io` and `errors`; no model and no tensors.
Out: a certificate that was judged again, for `bundle`, `post` and `stages`; checks and verdict, for the writer in `post`.
"""
