"""The stages of a run: a table of them, the runner that skips what is complete, and what joins the floors in each stage.

In: the configuration and the run directory; imports every floor (data, train, post, inference) and what they share.
Out: a finished run directory and a record of each stage, to the command line and to sweeps.
"""
