"""Writing the certificate: the JSON, its summary for a terminal, and the HTML page with its pictures.

In: measures, controls and thresholds from `pipeline/post/validate.py`; G_LM, metrics and samples for the page. Imports
`bundle`, `report`.
Out: a certificate as `bundle/certificate` describes it, and one self-contained HTML page.
"""
